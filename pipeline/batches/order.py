"""Which examples make a batch: the order of each epoch, from the data, the settings and the epoch alone."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from logitcask.cache.labels import SHARDS_KEPT, IntArray

GROUP = 64  # optimizer steps whose examples are sorted by length together


def held_out(examples: int, fraction: float, seed: int) -> IntArray:
    """Return the examples kept for evaluation, ascending: a fraction chosen by seed, at least one unless it is 0."""
    if fraction == 0.0:
        return np.zeros(0, dtype=np.int64)
    count = min(examples - 1, max(1, round(examples * fraction)))
    return np.sort(np.random.default_rng([seed, 1]).permutation(examples)[:count])


class BatchSampler(Sampler[list[int]]):
    """Batches of one epoch, determined by the data, the settings and the epoch alone.

    Each epoch shuffles the shards, and the examples within each, by seed and epoch; but with seed 0 the first epoch
    follows the order of the cache, which is random already.

    With several ranks each step takes ``ranks`` consecutive batches, one per rank; in the last step some may be short
    or empty. Each example therefore occurs once per epoch, and a step equals that of a single rank whose batch is as
    large as all of theirs together.

    With ``lengths`` (tokens per example) the examples of an optimizer step (``accumulation`` such steps) are of similar
    length: those of ``GROUP`` consecutive optimizer steps are sorted by length, and then the steps are shuffled.
    """

    def __init__(
        self,
        shard_starts: IntArray,
        left_out: IntArray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        lengths: IntArray | None = None,
        accumulation: int = 1,
    ) -> None:
        included = np.ones(int(shard_starts[-1]), dtype=bool)
        included[left_out] = False
        self._starts, self._included, self._lengths = shard_starts, included, lengths
        self.left_out: list[int] = left_out.tolist()
        self._seed, self._epoch = seed, 0
        self.batch_size, self.drop_last = batch_size, False
        self._step_size = ranks * batch_size * accumulation  # examples per optimizer step
        self._first, self._stride = rank * batch_size, ranks * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-int(self._included.sum()) // self._stride)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self._epoch)
        for step in range(0, len(order), self._stride):
            first = step + self._first
            yield order[first : first + self.batch_size].tolist()

    @property
    def shards_at_once(self) -> int:
        """The most shards that the examples of a group of steps come from: so many are read by turns."""
        if self._lengths is None:
            return SHARDS_KEPT
        sizes = np.sort(np.add.reduceat(self._included.astype(np.int64), self._starts[:-1]))
        whole = int(np.searchsorted(np.cumsum(sizes), GROUP * self._step_size))
        return min(len(sizes), whole + 2)  # the first and the last of them in part

    def step_examples(self, step: int) -> list[int]:
        """Return the examples of an optimizer step on all ranks; steps count from 0 over all epochs."""
        size = self._step_size
        epoch, within = divmod(step, -(-int(self._included.sum()) // size))
        examples: list[int] = self.order(epoch)[within * size : (within + 1) * size].tolist()
        return examples

    def order(self, epoch: int) -> IntArray:
        """Return the examples of an epoch, on all ranks together, in order."""
        shards = np.arange(len(self._starts) - 1)
        random = np.random.default_rng([self._seed, 2, epoch])
        shuffled = epoch > 0 or self._seed != 0
        if shuffled:
            random.shuffle(shards)
        parts = []
        for shard in shards:
            part = np.arange(self._starts[shard], self._starts[shard + 1])[
                self._included[self._starts[shard] : self._starts[shard + 1]]
            ]
            if shuffled:
                random.shuffle(part)
            parts.append(part)
        order = np.concatenate(parts)
        return order if self._lengths is None else self._group_by_length(order, self._lengths, random)

    def _group_by_length(self, order: IntArray, lengths: IntArray, random: np.random.Generator) -> IntArray:
        """Sort the examples of each group of steps by length, then shuffle the steps; a short last step stays last."""
        size = self._step_size
        whole = len(order) // size
        for first in range(0, whole, GROUP):
            part = order[first * size : min(first + GROUP, whole) * size]
            steps = part[np.argsort(lengths[part], kind="stable")].reshape(-1, size)
            part[:] = random.permutation(steps).reshape(-1)
        return order
