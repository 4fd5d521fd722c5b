"""The data set of one cache or of a mixture of caches, for any trainer on torch.

A random order over a cache decodes a shard for almost every example. Therefore the data set brings its order,
``batches``, which shuffles shards and the examples within them, and warns if another one defeats the shards.
"""

import os
import warnings
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch.utils.data import get_worker_info

from logitcask.cache.labels import IntArray
from logitcask.cache.manifest import Manifest
from logitcask.cache.reader import KEPT_BYTES, CacheReader
from logitcask.pipeline.batches.collate import TrainingExample
from logitcask.pipeline.batches.examples import CacheExamples, JoinedExamples
from logitcask.pipeline.batches.mixing import common_temperatures
from logitcask.pipeline.batches.mixture import MixedSampler, Mixture
from logitcask.pipeline.batches.order import BatchSampler

NONE_LEFT_OUT: IntArray = np.zeros(0, dtype=np.int64)


class CacheDataset(JoinedExamples):
    """The examples of caches, by index: those of the first cache, then those of the next.

    Worker processes open the caches for themselves; decoded shards take at most 800 MB per process, or one shard per
    cache. ``names`` says where the caches are.
    """

    def __init__(self, readers: Sequence[CacheReader], weights: Sequence[float], seed: int, stop: str) -> None:
        """Take open caches, and for several of them how they are mixed."""
        self.names = [reader.path for reader in readers]
        self._sources = [
            CacheExamples(reader.path, with_targets=True, opened=reader.opened, kept_bytes=KEPT_BYTES // len(readers))
            for reader in readers
        ]
        super().__init__(self._sources, self.names)
        self._shards = sum(len(reader.shard_starts) - 1 for reader in readers)
        self._mixing = tuple(weights), seed, stop
        self._ordered = False  # whether an order that suits the shards is in use
        self._reads = 0

    def __getitem__(self, index: int) -> TrainingExample:
        example = super().__getitem__(index)
        self._reads += 1
        if not self._ordered:
            self._warn_of_foreign_order()
        return example

    def __getitems__(self, indices: Sequence[int]) -> list[TrainingExample]:
        """Return several examples, decoding each shard once."""
        examples = {index: self[index] for index in sorted(set(indices))}
        return [examples[index] for index in indices]

    @property
    def manifests(self) -> list[Manifest]:
        """The caches' manifests."""
        return [source.reader.manifest for source in self._sources]

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return self.manifests[0].label.vocab_size

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(manifest.data.longest for manifest in self.manifests)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that every cache stores."""
        return common_temperatures([manifest.label.temperatures for manifest in self.manifests])

    @property
    def decodes(self) -> int:
        """Shards decoded so far in this process."""
        return sum(source.reader.decodes for source in self._sources)

    @cached_property
    def mixture(self) -> Mixture | None:
        """How several caches are mixed. Reads one object per shard."""
        if len(self._sources) == 1:
            return None
        weights, seed, stop = self._mixing
        return Mixture(
            names=tuple(self.names),
            shard_starts=tuple(source.reader.shard_starts for source in self._sources),
            positions=tuple(_counts(source, "position_count").astype(np.int32) for source in self._sources),
            weights=weights,
            seed=seed,
            stop=stop,
        )

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        packed: bool = True,
    ) -> BatchSampler:
        """Return the batches of indices of one rank, an order that decodes each shard once per epoch.

        Of a cache the order is that of ``logitcask train``; unless ``packed`` its batches hold examples of similar
        lengths, over the ``accumulation`` batches of an optimizer step. Of a mixture it depends on the caches and seeds
        alone.
        """
        self._ordered = True
        if self.mixture is not None:
            return MixedSampler(self.mixture, batch_size, seed, rank, ranks, accumulation)
        (source,) = self._sources
        lengths = None if packed else self._lengths
        sampler = BatchSampler(
            source.reader.shard_starts, NONE_LEFT_OUT, batch_size, seed, rank, ranks, lengths, accumulation
        )
        source.keep(sampler.shards_at_once)
        return sampler

    @cached_property
    def _lengths(self) -> IntArray:
        return _counts(self._sources[0], "token_count")

    def _warn_of_foreign_order(self) -> None:
        """Warn, once, if more than twice the shards were decoded that an order by shard would have decoded."""
        worker = get_worker_info()
        processes = (worker.num_workers if worker else 1) * int(os.environ.get("WORLD_SIZE", "1"))
        sweeps = -(-self._reads * processes // len(self))
        if (decodes := self.decodes) > 2 * self._shards * sweeps:
            self._ordered = True
            warnings.warn(
                f"{self.names[0]}: {decodes} shards decoded for {self._reads} examples, but there are only "
                f"{self._shards}: a random order decodes a shard for almost every example: use logitcask.loader, "
                "DistillationMixin, or this data set's batches() as batch_sampler",
                stacklevel=3,
            )


def _counts(source: CacheExamples, name: str) -> IntArray:
    return source.reader.counts(name, range(len(source.reader.shard_starts) - 1))
