"""Which examples of a cache are shown."""

from collections.abc import Sequence

import numpy as np

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.label_figures import sample_shards
from logitcask.pipeline.settings.cache import PART

RANKED_POSITIONS = 1_000_000  # target positions of the shards whose examples are ranked


def choose(reader: CacheReader, parts: Sequence[str], seed: int) -> dict[int, str]:
    """Return the chosen examples' indices, in order, each with the part that chose it.

    The worst are those whose text surprised the teacher most, per target position; they are ranked among the first
    shards, of about ``RANKED_POSITIONS``. Raises LogitcaskError if an index is beyond the cache.
    """
    chosen: dict[int, str] = {}
    ranked: IntArray | None = None
    for part in parts:
        match = PART.fullmatch(part)
        assert match is not None  # settings.cache
        if match["kind"] is None:
            indices = _range(reader, int(match["first"]), match["stop"])
        elif match["kind"] == "random":
            count = min(int(match["count"]), len(reader))
            indices = np.sort(np.random.default_rng(seed).choice(len(reader), count, replace=False))
        else:
            ranked = _by_surprise(reader) if ranked is None else ranked
            indices = (ranked[::-1] if match["kind"] == "worst" else ranked)[: int(match["count"])]
        for index in indices.tolist():
            chosen.setdefault(index, match["kind"] or "chosen")
    return chosen


def _range(reader: CacheReader, first: int, stop: str | None) -> IntArray:
    last = first + 1 if stop is None else int(stop)
    if not first < last <= len(reader):
        part = f"{first}" if stop is None else f"{first}:{stop}"
        raise LogitcaskError(
            f"--examples {part}: {reader.path} has the examples 0 to {len(reader) - 1}: choose from them"
        )
    return np.arange(first, last)


def _by_surprise(reader: CacheReader) -> IntArray:
    """Return examples that have targets, by the mean of -log p(next token), ascending."""
    found: list[tuple[float, int]] = []
    for index in sample_shards(reader, range(len(reader.shard_starts) - 1), RANKED_POSITIONS):
        shard = reader.shard(index)
        counts = shard.position_count
        owner = np.repeat(np.arange(len(shard)), counts)
        sums = np.bincount(owner, weights=-shard.targets.gold_logprobs.astype(np.float64), minlength=len(shard))
        first = int(reader.shard_starts[index])
        found += [(float(sums[i] / counts[i]), first + i) for i in range(len(shard)) if counts[i]]
    return np.array([index for _, index in sorted(found)], dtype=np.int64)
