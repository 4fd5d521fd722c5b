"""A cache as an object. Needs neither torch nor transformers but for what says so."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.labels import Example, IntArray
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import CacheInfo, describe
from logitcask.cache.storage.url import is_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from logitcask.pipeline.batches.collate import Collator
    from logitcask.pipeline.batches.dataset import CacheDataset


class OutOfRange(LogitcaskError, IndexError):
    """An index that no example has."""


class Cache:
    """A complete cache, open for reading: a sequence of examples.

        with logitcask.open("data/cache") as cache:
            example = cache[0]
            example.input_ids, example.target_mask, example.targets.gold_logprobs
            for example in cache[:100]: ...

    ``cache[i]`` is an ``Example`` of numpy arrays, decoded and your own to change. A slice, a list or array of indices
    or a boolean array gives a list, and decodes each shard once. The last two shards stay in memory.
    """

    def __init__(self, reader: CacheReader) -> None:
        """Take an open reader; ``logitcask.open`` makes one."""
        self.path = reader.path
        self._open: CacheReader | None = reader

    @property
    def reader(self) -> CacheReader:
        """The reader below. Raises LogitcaskError if the cache is closed."""
        if self._open is None:
            raise LogitcaskError(f"{self.path}: this cache is closed: open it again")
        return self._open

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that students can train at; those of exact labels at any other, too."""
        return tuple(self.reader.manifest.label.temperatures)

    @property
    def label(self) -> LabelSettings:
        """How the labels were made: sizes of head and tail, temperatures, vocabulary."""
        return self.reader.manifest.label

    def info(self) -> CacheInfo:
        """Return what ``logitcask cache info`` shows, as a record. It reads a sample of the labels."""
        return describe(self.reader.path)

    def close(self) -> None:
        """Free the shards in memory; the cache cannot be read any more."""
        self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<logitcask.Cache {self.path}{': closed' if self._open is None else f': {len(self):,} examples'}>"

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Example: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[Any]) -> list[Example]: ...

    def __getitem__(self, index: Any) -> Example | list[Example]:
        if isinstance(index, (int, np.integer)) and not isinstance(index, (bool, np.bool_)):
            return _own(self.reader.example(int(self._places(np.array([index]))[0])))
        places = self._places(index)
        found: dict[int, Example] = {}
        for place in np.unique(places).tolist():  # ascending, so by shard
            found[place] = _own(self.reader.example(place))
        return [found[place] for place in places.tolist()]

    def check(self, tokenizer: "str | Path | PreTrainedTokenizerBase") -> None:
        """Raise CacheMismatchError, with the differences, unless a tokenizer is the cache's.

        ``tokenizer`` is one, or the hub id or folder of a model that brings one. Needs transformers.
        """
        from logitcask.pipeline.text import tokenizer as tokenizers

        other = tokenizers.load_tokenizer(str(tokenizer)) if isinstance(tokenizer, (str, Path)) else tokenizer
        if tokenizers.fingerprint(other) == self.reader.manifest.tokenizer.fingerprint:
            return
        name = tokenizer if isinstance(tokenizer, (str, Path)) else other.name_or_path or "the tokenizer"
        own = tokenizers.tokenizer_from_files(self.reader.tokenizer_files())
        different = "; ".join(tokenizers.tokenizer_differences(own, other)) or "its fingerprint"
        raise CacheMismatchError(f"{self.path}: was made with another tokenizer than {name}'s, which has: {different}")

    def dataset(self) -> "CacheDataset":
        """Return the examples as a torch data set, which brings an order that decodes each shard once. Needs torch.

        Its items are for ``collator``. Use its ``batches`` as ``batch_sampler``, or ``logitcask.loader``, or the
        ``DistillationMixin``: a random order decodes a shard for almost every example, and it warns of one.
        """
        from logitcask.library.training import dataset_of

        return dataset_of(self)

    def collator(self, temperature: float = 1.0, tail: str | None = None, *, packed: bool = False) -> "Collator":
        """Return the function that makes a batch of a data set's items, with labels at a temperature. Needs torch.

        ``tail`` says what stands for the mass outside the head: "sampled", "bucket" or "renormalize", by default the
        first of these that the cache has what it needs for. Exact labels need none: left out, the whole distribution is
        taken, at any temperature. ``packed`` puts several examples into a row, separated by ``position_ids``. Raises
        LogitcaskError if the cache does not store the temperature, or lacks what the tail needs.
        """
        from logitcask.library.training import collator_of

        return collator_of(self, temperature, tail, packed=packed)

    def _places(self, index: Any) -> IntArray:
        """Return the indices of some examples, from 0. Raises OutOfRange if one is not there."""
        count = len(self)
        if isinstance(index, slice):
            return np.arange(count)[index]
        wanted = np.asarray(index)
        if wanted.dtype == bool and wanted.shape == (count,):
            return np.flatnonzero(wanted)
        if wanted.size == 0:
            return np.zeros(0, dtype=np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise LogitcaskError(
                f"{self.path}: an index must be a whole number, a slice, a list of whole numbers or {count:,} booleans"
            )
        outside = wanted[(wanted < -count) | (wanted >= count)]
        if outside.size:
            raise OutOfRange(f"{self.path}: index {outside[0]} is out of range: the cache has {count:,} examples")
        return np.where(wanted < 0, wanted + count, wanted).astype(np.int64)


def open(path: str | Path, revision: str | None = None) -> Cache:
    """Open a cache in a folder, in a .zip file, or at an s3://, gs://, ssh:// or hf:// URL.

        cache = logitcask.open("hf://datasets/org/name", revision="v1")

    ``revision`` is a branch, tag or commit of a repository on the Hugging Face hub. Raises LogitcaskError if there is
    no complete cache.
    """
    return Cache(CacheReader(path if revision is None else at_revision(path, revision)))


def at_revision(path: str | Path, revision: str) -> str:
    """Return the URL of a repository on the hub at a revision. Raises LogitcaskError if the path is no such URL."""
    scheme, _, place = str(path).partition("://")
    parts = place.split("/")
    owner = 1 if parts[0] in ("datasets", "spaces", "buckets") else 0
    if not is_url(str(path)) or scheme != "hf" or len(parts) < owner + 2 or not revision:
        raise LogitcaskError(f"{path}: revision={revision!r}: only an hf:// URL has revisions: leave it out")
    if "@" in parts[owner + 1]:
        raise LogitcaskError(f"{path}: already names a revision: leave out revision={revision!r}")
    parts[owner + 1] += f"@{quote(revision, safe='')}"
    return f"hf://{'/'.join(parts)}"


def _own(example: Example) -> Example:
    """Return a copy: what a reader gives are views of a whole shard."""
    targets = example.targets
    copies = {name: np.array(values, order="C") for name, values in vars(targets).items()}
    return Example(example.input_ids, example.target_mask.copy(), replace(targets, **copies))
