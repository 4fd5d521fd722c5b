"""The order of several caches mixed by weight, and their batches.

Weights are shares of target positions. Each cache is read in an order of its own, shards shuffled and examples within
each, again in another order whenever it has been read once. Next comes always the cache that lags most behind its
share, so the shares hold from any beginning of an epoch on, to within one example.

Legend: C caches, S shards of one of them, E examples of one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.pipeline.batches.order import BatchSampler

STOPS = ("first", "all")
MOST_READINGS = 1000  # of a cache in one epoch
LONGER = 1.02  # factor on what is ordered if an epoch's order turns out to be too short


@dataclass(frozen=True)
class Mixture:
    """C caches and their shares; an example's index counts through the caches in order.

    The first epoch ends when the first cache has been read once (``stop="first"``), or each has (``"all"``). Later
    epochs have as many examples, so that the steps of a run can be counted beforehand.
    """

    names: tuple[str, ...]  # (C,)
    shard_starts: tuple[IntArray, ...]  # (C,) of (S + 1,)
    positions: tuple[NDArray[np.int32], ...]  # (C,) of (E,), target positions of each example
    weights: tuple[float, ...]  # (C,), sum to 1
    seed: int
    stop: str

    @cached_property
    def examples(self) -> int:
        """Examples per epoch."""
        return len(self._until(self.end, 0, 0))

    def order(self, seed: int, epoch: int) -> IntArray:
        """Return the examples of an epoch in order."""
        end = self.end
        while len(order := self._until(end, seed, epoch)) < self.examples:
            end *= LONGER
        return order[: self.examples]

    @property
    def end(self) -> float:
        """Where the first epoch ends: the positions of all caches together, if each has its share."""
        ends = [float(part.sum(dtype=np.int64)) / w for part, w in zip(self.positions, self.weights, strict=True)]
        end = min(ends) if self.stop == "first" else max(ends)
        for name, own in zip(self.names, ends, strict=True):
            if end > MOST_READINGS * own:
                raise LogitcaskError(
                    f"{name}: would be read {end / own:,.0f} times per epoch to have its share: lower its weight, or "
                    'use stop="first"'
                )
        return end

    def _until(self, end: float, seed: int, epoch: int) -> IntArray:
        """Return the examples that start before ``end`` where every cache has its share, in order."""
        starts, parts, first = [], [], 0
        for cache, (shards, positions, weight) in enumerate(
            zip(self.shard_starts, self.positions, self.weights, strict=True)
        ):
            read, reading = 0, 0
            while read / weight < end:
                order = shuffled_shards(shards, [self.seed, 3, seed, epoch, cache, reading])
                ends = read + np.cumsum(positions[order], dtype=np.int64)
                begins = np.concatenate([[read], ends[:-1]]) / weight
                inside = int(np.searchsorted(begins, end))
                starts.append(begins[:inside])
                parts.append(first + order[:inside])
                read, reading = int(ends[-1]), reading + 1
            first += len(positions)
        merged: IntArray = np.concatenate(parts)[np.argsort(np.concatenate(starts), kind="stable")]
        return merged


def shuffled_shards(shard_starts: IntArray, seed: Sequence[int]) -> IntArray:
    """Return the examples of a cache, (E,): its shards in random order, and the examples of each."""
    random = np.random.default_rng(seed)
    shards = random.permutation(len(shard_starts) - 1)
    return np.concatenate([random.permutation(np.arange(shard_starts[s], shard_starts[s + 1])) for s in shards])


class MixedSampler(BatchSampler):
    """The batches of a mixture, as those of ``BatchSampler``; the mixture does not count the examples left out."""

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        left_out: IntArray | None = None,
    ) -> None:
        whole, nothing = np.array([0, mixture.examples], dtype=np.int64), np.zeros(0, dtype=np.int64)
        super().__init__(whole, nothing, batch_size, seed, rank, ranks, accumulation=accumulation)
        self._mixture, self._own_seed = mixture, seed
        self._kept: IntArray | None = None
        if left_out is not None:
            self.left_out = left_out.tolist()
            count = sum(int(starts[-1]) for starts in mixture.shard_starts)
            self._kept = np.delete(np.arange(count + len(left_out)), left_out)

    def order(self, epoch: int) -> IntArray:
        """Return the examples of an epoch, on all ranks together, in order."""
        order = self._mixture.order(self._own_seed, epoch)
        return order if self._kept is None else self._kept[order]
