"""What opening a cache costs as it grows: seconds and memory, for 100 shards and for 10,000 with 1,000,000 examples.

Run as ``python -m tests.benchmarks.opening``. Only the objects that opening and the first example read are made.
"""

import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from logitcask.cache.integrity import commit_key
from logitcask.cache.labels import Shard, SparseTargets
from logitcask.cache.layout import array_specs
from logitcask.cache.manifest import (
    FORMAT_VERSION,
    DataIdentity,
    LabelSettings,
    Manifest,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache.reader import CacheReader
from logitcask.cache.writer import create_cache
from logitcask.pipeline.precompute.sharding import plan_strides

EXAMPLES = 100  # per shard
LABEL = LabelSettings(vocab_size=300, head_size=1, tail_draws=0, temperatures=[1.0], seed=0)


def shard() -> Shard:
    """Return examples of two tokens and one label."""
    ones, zeros = np.ones((EXAMPLES, 1), np.float32), np.zeros((EXAMPLES, 1), np.float32)
    none = np.zeros((EXAMPLES, 0), dtype=np.int64)
    log_half = np.float32(np.log(0.5))
    targets = SparseTargets(
        head_ids=ones.astype(np.int64),
        head_logprobs=ones * log_half,
        tail_ids=none,
        tail_logprobs=none.astype(np.float32),
        tail_counts=none,
        log_partition=zeros,
        log_tail_mass=ones * log_half,
        gold_logprobs=-ones[:, 0],
    )
    return Shard(
        token_count=np.full(EXAMPLES, 2),
        position_count=np.full(EXAMPLES, 1),
        input_ids=np.ones(2 * EXAMPLES, dtype=np.int64),
        target_mask=np.tile([True, False], EXAMPLES),
        targets=targets,
    )


def make(folder: Path, shards: int) -> None:
    """Create a cache whose first shard is written and of which every shard has a commit record."""
    total, starts = shards * EXAMPLES, np.full(shards, EXAMPLES, dtype=np.int64)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        teacher=TeacherIdentity(id="t", revision="", weights="0" * 64, dtype="float32", engine="none", versions={}),
        tokenizer=TokenizerIdentity(fingerprint="1" * 64, chat_template=None, files={}),
        data=DataIdentity(
            fingerprint="2" * 64,
            examples=total,
            tokens=2 * total,
            positions=total,
            truncated=0,
            dropped=0,
            max_seq_length=2,
            longest=2,
            prompt_loss=False,
        ),
        label=LABEL,
        shards=plan_strides(starts, np.full(total, 2), np.ones(total, dtype=np.int64)),
    )
    create_cache(folder, manifest, starts, {}).write_shard(0, shard())
    record = (folder / commit_key(0)).read_bytes()
    for index in range(1, shards):
        place = folder / commit_key(index)
        place.parent.mkdir()
        place.write_bytes(record)
    for spec in array_specs(LABEL)[:1]:  # token_count, which the start of training reads
        data = (folder / spec.name / "c" / "0").read_bytes()
        for index in range(1, shards):
            (folder / spec.name / "c" / str(index)).write_bytes(data)


def main() -> None:
    """Print one line per size."""
    for shards in (100, 10_000):
        folder = Path(tempfile.mkdtemp(prefix="logitcask-"))
        try:
            make(folder / "cache", shards)
            CacheReader(folder / "cache")  # warm: imports, the page cache
            began = time.perf_counter()
            reader = CacheReader(folder / "cache")
            opened = time.perf_counter()
            reader.example(0)
            first = time.perf_counter()
            reader.counts("token_count", range(reader.manifest.shards.count))
            counted = time.perf_counter()
            tracemalloc.start()
            CacheReader(folder / "cache")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            print(
                f"{shards:6d} shards, {len(reader):9,d} examples: opened in {opened - began:.2f} s, peak "
                f"{peak / 1e6:.1f} MB; first example {1000 * (first - opened):.0f} ms; "
                f"counts {counted - first:.1f} s"
            )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
