"""Reading a cache: by example or by shard, in any order. A shard that is not committed is not there."""

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store

from logitcask.cache.errors import CacheFormatError, IncompleteCacheError
from logitcask.cache.fidelity import FidelitySums, unsound
from logitcask.cache.integrity import commit_record, committed_shards, constant_layout, read_proved, shard_keys
from logitcask.cache.invariants import unusable
from logitcask.cache.labels import Example, IntArray, Shard
from logitcask.cache.layout import ArraySpec, Axis, array_specs, decode_targets, zarr_layout
from logitcask.cache.manifest import Manifest, ShardPlan, parse_manifest, sha256
from logitcask.cache.storage.bounded import Decoder, read_bounded, read_json
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.cache.storage.open import open_store

SHARDS_KEPT = 2  # decoded shards held in memory: a batch may straddle two
AT_ONCE = 4  # objects of a shard read at the same time
MAX_TOKENIZER_FILE = 1 << 26  # bytes; the largest in use are half of it


def read_manifest(store: Store, where: str) -> Manifest:
    """The manifest of the cache in a store. Raises CacheFormatError where there is none."""
    try:
        group = read_json(store, "zarr.json")
    except CacheFormatError as error:
        raise CacheFormatError(f"{where}: not a logit cache: {error}") from error
    if group is None or (group.get("zarr_format"), group.get("node_type")) != (3, "group"):
        raise CacheFormatError(f"{where}: not a logit cache: no Zarr v3 group with a manifest in it")
    return parse_manifest(group.get("attributes"), where)


def is_complete(path: str | Path) -> bool:
    """Whether a complete, readable cache lies there."""
    try:
        CacheReader(path)
    except (CacheFormatError, IncompleteCacheError):
        return False
    return True


@functools.lru_cache(maxsize=64)
def _decoder(spec: ArraySpec, plan: ShardPlan) -> Decoder:
    return Decoder(spec.name, zarr_layout(spec, plan))


class CacheReader:
    """A complete cache, opened for reading.

    ``manifest`` says what it was made from; ``shard_starts`` (S + 1,) gives the first example of each shard.
    """

    def __init__(
        self, place: str | Path | Store, *, partial: bool = False, disk_cache: DiskCache | None = None
    ) -> None:
        """Open a cache in a folder, a .zip file, at a URL (what is read stays in ``disk_cache``) or in a Zarr store.

        Raises CacheFormatError where it is none, IncompleteCacheError where shards are missing, unless ``partial``.
        """
        self.path = str(place)
        self._store = place if isinstance(place, Store) else open_store(place, read_only=True, disk_cache=disk_cache)
        self.manifest = read_manifest(self._store, self.path)
        count = self.manifest.shards.count
        done = committed_shards(self._store, count)
        if len(done) < count and not partial:
            raise IncompleteCacheError(
                f"{self.path}: {len(done)} of {count} shards are committed: finish it with the same "
                "logitcask precompute-logits or cache copy command that began it"
            )
        self._specs = array_specs(self.manifest.label)
        try:
            self._decoders = {spec.name: _decoder(spec, self.manifest.shards) for spec in self._specs}
            for decoder in self._decoders.values():
                decoder.require_document(self._store)
            self.shard_starts = self._read_starts(count)
        except CacheFormatError as error:
            raise CacheFormatError(f"{self.path}: {error}; run logitcask cache verify") from error
        self._decoded = functools.lru_cache(maxsize=SHARDS_KEPT)(self._read_shard)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def shard(self, index: int) -> Shard:
        """A whole shard; the last few read are kept in memory. Raises CacheFormatError where it is damaged."""
        return self._decoded(index)

    def example(self, index: int) -> Example:
        """An example by its place in the cache. Raises CacheFormatError where its shard is damaged."""
        shard = int(np.searchsorted(self.shard_starts, index, side="right")) - 1
        return self.shard(shard).example(index - int(self.shard_starts[shard]))

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name. Raises CacheFormatError where one is damaged."""
        files = {}
        for name, digest in self.manifest.tokenizer.files.items():
            key = f"tokenizer/{name}"
            try:
                data = self._constant(key, self._length(key), "uint8").tobytes()
            except CacheFormatError as error:
                raise CacheFormatError(f"{self.path}: {error}; run logitcask cache verify") from error
            if sha256(data) != digest:
                raise CacheFormatError(f"{self.path}: {key} is damaged: its digest is not the manifest's")
            files[name] = data
        return files

    def shard_fidelity(self, index: int) -> FidelitySums:
        """A shard's row of the fidelity certificate. Raises CacheFormatError where it is damaged or there is none."""
        names = [spec.name for spec in self._specs]
        if "fidelity" not in names:
            raise CacheFormatError(f"{self.path}: no fidelity was measured: see --fidelity-positions of stage 1")
        with self._told(index):
            record = commit_record(self._store, self._specs, index)
            row = FidelitySums(self._slots(names.index("fidelity"), index, record, 1)[0].astype(np.float64))
            problem = unsound(row, len(self.manifest.label.temperatures), self.manifest.shards.positions)
            if problem:
                raise CacheFormatError(problem)
        return row

    def counts(self, name: str, shards: range) -> IntArray:
        """``token_count`` or ``position_count`` of every example of some shards, in order. Reads one object a shard."""
        place = [spec.name for spec in self._specs].index(name)
        parts = []
        for index in shards:
            with self._told(index):
                record = commit_record(self._store, self._specs, index)
                examples = int(self.shard_starts[index + 1] - self.shard_starts[index])
                parts.append(self._slots(place, index, record, examples).astype(np.int64))
        return np.concatenate(parts)

    def _read_shard(self, index: int) -> Shard:
        with self._told(index):
            record = commit_record(self._store, self._specs, index)
            plan = self.manifest.shards
            examples = int(self.shard_starts[index + 1] - self.shard_starts[index])
            found = self._arrays("example", index, record, examples)
            tokens, positions = (int(found[f"{name}_count"].sum(dtype=np.int64)) for name in ("token", "position"))
            if tokens > plan.tokens or positions > plan.positions:
                raise CacheFormatError("its examples do not fit it")
            found |= self._arrays("token", index, record, tokens) | self._arrays("position", index, record, positions)
            shard = Shard(
                token_count=found.pop("token_count").astype(np.int64),
                position_count=found.pop("position_count").astype(np.int64),
                input_ids=found.pop("input_ids").astype(np.int64),
                target_mask=found.pop("target_mask").astype(bool),
                targets=decode_targets(found, self.manifest.label),
            )
            for problem in unusable(shard, self.manifest):
                raise CacheFormatError(problem)
        return shard

    def _arrays(self, axis: Axis, index: int, record: bytes, count: int) -> dict[str, NDArray[Any]]:
        """The first ``count`` slots of a shard in all arrays on an axis, several read at a time."""
        places = [place for place, spec in enumerate(self._specs) if spec.axis == axis]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = threads.map(lambda place: self._slots(place, index, record, count), places)
            return {self._specs[place].name: values for place, values in zip(places, found, strict=True)}

    def _slots(self, place: int, index: int, record: bytes, count: int) -> NDArray[Any]:
        """The first ``count`` slots of a shard in the array at ``place`` of the specs, proved by the commit record."""
        key = shard_keys([self._specs[place]], index)[0]
        data = read_proved(self._store, key, record[32 * place : 32 * place + 32])
        return self._decoders[self._specs[place].name].decode(key, data, count)

    @contextlib.contextmanager
    def _told(self, index: int) -> Iterator[None]:
        try:
            yield
        except CacheFormatError as error:
            raise CacheFormatError(
                f"{self.path}: shard {index} is damaged: {error}; run logitcask cache verify --repair"
            ) from error

    def _read_starts(self, count: int) -> IntArray:
        examples = self._constant("shard_examples", count, "int64").astype("<i8")
        plan, total = self.manifest.shards, self.manifest.data.examples
        if sha256(examples.tobytes()) != plan.digest:
            raise CacheFormatError("shard_examples is damaged: its digest is not the manifest's")
        if int(examples.min()) < 1 or int(examples.max()) > plan.examples or int(examples.sum()) != total:
            raise CacheFormatError(f"shard_examples: must be 1 to {plan.examples} a shard and {total} in all")
        return np.concatenate([[0], np.cumsum(examples)]).astype(np.int64)

    def _constant(self, name: str, length: int, dtype: str) -> NDArray[Any]:
        """An array outside the shards, of the length that belongs to it."""
        decoder = Decoder(name, constant_layout(length, dtype))
        decoder.require_document(self._store)
        data = read_bounded(self._store, f"{name}/c/0")
        if data is None:
            raise CacheFormatError(f"{name}/c/0: missing")
        return decoder.decode(f"{name}/c/0", data, length)

    def _length(self, name: str) -> int:
        """What a tokenizer file's array says of its length: the manifest does not keep it."""
        shape = (read_json(self._store, f"{name}/zarr.json") or {}).get("shape")
        if not (isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int)):
            raise CacheFormatError(f"array {name} is missing")
        if not 0 <= shape[0] <= MAX_TOKENIZER_FILE:
            raise CacheFormatError(f"array {name} is longer than {MAX_TOKENIZER_FILE} bytes")
        return shape[0]
