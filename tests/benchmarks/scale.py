"""The shard plan and the commits of a labelling of 100 billion tokens, without a teacher: seconds and memory.

Then how fast one process tokenizes, on functions of the Python standard library and SmolLM2's tokenizer. Run as
``python -m tests.benchmarks.scale [TOKENS] [SHARD_POSITIONS]``.
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

from logitcask.cache.integrity import commit_key, committed_shards
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.precompute.sharding import cut_shards, plan_strides, shards_of, shuffled
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.token_table import TokenTable
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.text.tokens.stage import stage_tokens
from tests.benchmarks.capture import teacher_path

MEAN_LENGTH = 1000
ARRAYS = 12
WORKERS = 64
EXAMPLES = 5_000  # to tokenize, at most
T = TypeVar("T")


def timed(what: str, work: Callable[[], T]) -> T:
    """Do the work; print how long it took and the process's peak memory so far."""
    began = time.perf_counter()
    found = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what:44s}{time.perf_counter() - began:8.1f} s, peak {peak:5.1f} GB", flush=True)
    return found


def tokenizing(folder: Path) -> None:
    """Print the speed of stage 1's first step: read, encode and stage all examples."""
    source = str(from_source(None, folder / "data", EXAMPLES, seed=0).path)
    encoder = Encoder(load_tokenizer(teacher_path()), prompt_loss=False)

    def stage() -> TokenTable:
        return stage_tokens(encoder, (source,), folder, bad=BadRecords(folder / "bad.jsonl"), max_seq_length=1024)

    began = time.perf_counter()
    data = timed("tokenize", stage).identity
    speed = data.tokens / (time.perf_counter() - began)
    print(f"{data.tokens:,} tokens of {data.examples:,} examples: {speed:,.0f} tokens/s")


def main() -> None:
    """Print one line per step."""
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
    with tempfile.TemporaryDirectory() as folder:
        tokenizing(Path(folder))


if __name__ == "__main__":
    main()
