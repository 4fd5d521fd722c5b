"""The examples of a run, by index: those of a cache, of a tokenized file, or of several of them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from logitcask.cache.labels import SHARDS_KEPT, IntArray
from logitcask.cache.reader import KEPT_BYTES, CacheReader
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.batches.collate import Examples, TrainingExample
from logitcask.pipeline.text.token_table import TokenTable
from logitcask.pipeline.text.tokens.encoded import Encoded


class CacheExamples(Examples):
    """The examples of a cache, which each worker process opens for itself at its first read."""

    def __init__(
        self,
        path: str,
        *,
        with_targets: bool,
        disk_cache: DiskCache | None = None,
        opened: bytes | None = None,
        chosen: IntArray | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """Take the ``chosen`` examples of the cache at a path, the one that another reader has ``opened`` if given."""
        self._path, self._with_targets, self._disk_cache, self._opened = path, with_targets, disk_cache, opened
        self._chosen = chosen
        self._kept_bytes, self._shards_kept = kept_bytes, SHARDS_KEPT
        self._reader: CacheReader | None = None

    @property
    def reader(self) -> CacheReader:
        """The open cache."""
        if self._reader is None:
            self._reader = CacheReader(
                self._path, disk_cache=self._disk_cache, opened=self._opened, kept_bytes=self._kept_bytes
            )
            self._reader.keep(self._shards_kept)
            self._opened = self._reader.opened
        return self._reader

    def keep(self, shards: int) -> None:
        """Keep up to so many decoded shards in memory, as far as ``kept_bytes`` allows, in worker processes too."""
        self._shards_kept = shards
        self.reader.keep(shards)

    def __len__(self) -> int:
        return len(self.reader if self._chosen is None else self._chosen)

    def __getitem__(self, index: int) -> TrainingExample:
        example = self.reader.example(index if self._chosen is None else int(self._chosen[index]))
        encoded = Encoded(example.input_ids, example.target_mask)
        return TrainingExample(encoded, example.targets if self._with_targets else None)

    def describe(self, indices: Sequence[int]) -> str:
        """Return the examples' numbers in the whole cache."""
        return super().describe(indices if self._chosen is None else self._chosen[np.array(indices, int)].tolist())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None}


class FileExamples(Examples):
    """The examples of a tokenized file, for output distillation without a cache."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TrainingExample:
        return TrainingExample(self._table.example(index), None)


class JoinedExamples(Examples):
    """The examples of several sources, by index: those of the first, then those of the next."""

    def __init__(self, sources: Sequence[Examples], names: Sequence[str]) -> None:
        self._parts, self._names = tuple(sources), tuple(names)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self._parts)))  # opens caches

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> TrainingExample:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self):,}")  # which ends a plain iteration
        source, own = self._place(index)
        return replace(self._parts[source][own], source=source)

    def describe(self, indices: Sequence[int]) -> str:
        """Return the examples' numbers by the source that they are from."""
        by_source: dict[int, list[int]] = {}
        for index in indices:
            source, own = self._place(index)
            by_source.setdefault(source, []).append(own)
        return " and ".join(
            f"{self._parts[source].describe(own)} of {self._names[source]}" for source, own in sorted(by_source.items())
        )

    def _place(self, index: int) -> tuple[int, int]:
        """Return which source an example is from, and its index there."""
        source = bisect_right(self._ends, index)
        return source, int(index) - (self._ends[source] - len(self._parts[source]))
