"""The shard plan and the commits of a labelling of 100 billion tokens, without a teacher: seconds and memory.

Run as ``python -m tests.benchmarks.scale [TOKENS] [SHARD_POSITIONS]``; a tenth of the examples is drawn and repeated.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from zarr.storage import LocalStore

from cache.integrity import commit_key, committed_shards
from pipeline.shards import cut_shards, plan_strides, shards_of, shuffled

MEAN_LENGTH = 1000
ARRAYS = 12
WORKERS = 64
T = TypeVar("T")


def timed(what: str, work: Callable[[], T]) -> T:
    """Do it and print how long it took, and the process's peak memory so far."""
    began = time.perf_counter()
    found = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what:44s}{time.perf_counter() - began:8.1f} s, peak {peak:5.1f} GB", flush=True)
    return found


def main() -> None:
    """Print a line for each step."""
    tokens, shard_positions = (int(float(value)) for value in [*sys.argv[1:], "1e11", "1048576"][:2])
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / MEAN_LENGTH, tokens // MEAN_LENGTH).astype(np.int32)
    order = timed(f"shuffle {len(lengths):,} examples", lambda: shuffled(len(lengths), 0))
    counts = lengths[order].astype(np.int64)
    del order
    starts = timed("cut shards", lambda: cut_shards(counts, shard_positions))
    plan = timed("strides", lambda: plan_strides(starts, counts, counts))
    print(f"{plan.count:,} shards, {(ARRAYS + 1) * plan.count:,} objects; {WORKERS} workers' shares: ", end="")
    print(sorted({len(shards_of((i, WORKERS), plan.count)) for i in range(1, WORKERS + 1)}))
    with tempfile.TemporaryDirectory() as folder:
        store, record = LocalStore(folder), bytes(32 * ARRAYS)

        def commit() -> None:
            for index in range(plan.count):
                place = Path(folder, commit_key(index))
                place.parent.mkdir(parents=True)
                place.write_bytes(record)

        timed("write all commit records", commit)
        found = timed("which shards are committed", lambda: committed_shards(store, plan.count))
        assert len(found) == plan.count


if __name__ == "__main__":
    main()
