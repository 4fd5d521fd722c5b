"""Reading a cache by example or by shard, in any order. A shard without a commit record does not exist."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store

from logitcask.cache.errors import CacheFormatError, CacheMismatchError, IncompleteCacheError, shown
from logitcask.cache.exact.head import TeacherHead, head_of, layouts, read_array
from logitcask.cache.fidelity import FidelitySums, unsound
from logitcask.cache.integrity import (
    commit_record,
    committed_shards,
    constant_layout,
    digest,
    read_verified,
    shard_keys,
)
from logitcask.cache.invariants import unusable
from logitcask.cache.labels import SHARDS_KEPT, Example, IntArray, Shard
from logitcask.cache.layout import ArraySpec, Axis, decode_made_by, decode_targets, shard_specs, zarr_layout
from logitcask.cache.manifest import MadeBy, Manifest, ShardPlan, metadata_values, parse_manifest, sha256, shard_bytes
from logitcask.cache.storage.bounded import Decoder, read_bounded, read_json
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.cache.storage.open import open_store, what_is_there

KEPT_BYTES = 800 << 20  # at most, if more than one is kept
AT_ONCE = 4  # objects of a shard read at the same time
MAX_TOKENIZER_FILE = 1 << 26  # bytes; the largest in use are half of it


def read_manifest(store: Store, where: str) -> Manifest:
    """Return the manifest of the cache in a store. Raises CacheFormatError if there is no readable one."""
    try:
        group = read_json(store, "zarr.json")
    except CacheFormatError as error:
        raise CacheFormatError(f"{where}: not a logit cache: {error}") from error
    if group is None or (group.get("zarr_format"), group.get("node_type")) != (3, "group"):
        there = what_is_there(store) if group is None else ""
        raise CacheFormatError(f"{where}: not a logit cache: no Zarr v3 group with a manifest in it{there}")
    return parse_manifest(group.get("attributes"), where)


def is_complete(path: str | Path) -> bool:
    """Return whether a path holds a complete, readable cache."""
    try:
        CacheReader(path)
    except (CacheFormatError, IncompleteCacheError):
        return False
    return True


def matching(reader: "CacheReader", where: Mapping[str, Sequence[str]]) -> IntArray:
    """Return the examples that have one of the values given for each column, ascending.

    Raises CacheMismatchError, naming what there is, if the cache has no such column or no such example.
    """
    values = metadata_values(reader.manifest)
    kept = np.ones(len(reader), dtype=bool)
    for column, wanted in where.items():
        known = values.get(column)
        if known is None:
            has = ", ".join(values) or "none: the data it was made from had neither category nor language"
            raise CacheMismatchError(f"{reader.path}: --where {column}: is no column of this cache; it has {has}")
        unknown = [value for value in wanted if value not in known]
        if unknown:
            raise CacheMismatchError(
                f"{reader.path}: --where {column}={unknown[0]}: no example has it; there are {shown(known)}"
            )
        codes = reader.counts(column, range(reader.manifest.shards.count))
        kept &= np.isin(codes, [known.index(value) + 1 for value in wanted])
    if not kept.any():
        raise CacheMismatchError(f"{reader.path}: --where: no example has all of these values")
    return np.flatnonzero(kept)


@functools.lru_cache(maxsize=64)
def _decoder(spec: ArraySpec, plan: ShardPlan) -> Decoder:
    return Decoder(spec.name, zarr_layout(spec, plan))


class CacheReader:
    """A complete cache, opened for reading.

    ``manifest`` records what it was made from; ``shard_starts`` (S + 1,) gives the first example of each shard;
    ``opened`` is the digest of the manifest's document; ``decodes`` counts the shards decoded so far.
    """

    def __init__(
        self,
        place: str | Path | Store,
        *,
        partial: bool = False,
        disk_cache: DiskCache | None = None,
        opened: bytes | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """Open a cache in a folder, in a .zip file, at a URL (reads are cached in ``disk_cache``) or in a Zarr store.

        Decoded shards stay in memory up to ``kept_bytes``, at least one and at most ``SHARDS_KEPT``; see ``keep``.

        Raises CacheFormatError if it is not a sound cache, unless ``partial`` IncompleteCacheError if shards are
        missing, and CacheMismatchError if ``opened``, the attribute of another reader, is of another cache. Every read
        of a shard raises CacheMismatchError if another cache has taken the place of the one that was opened.
        """
        self.path = str(place)
        self._store = place if isinstance(place, Store) else open_store(place, read_only=True, disk_cache=disk_cache)
        self.opened = digest(self._store, "zarr.json")
        self.manifest = read_manifest(self._store, self.path)
        if opened is not None:
            self.opened = opened
            self._require_unchanged()
        count = self.manifest.shards.count
        self.committed = committed_shards(self._store, count)
        if len(self.committed) < count and not partial:
            raise IncompleteCacheError(
                f"{self.path}: {len(self.committed)} of {count} shards are committed: finish it with the same "
                "logitcask precompute-logits or cache copy command that started it"
            )
        self._specs = shard_specs(self.manifest)
        try:
            self._decoders = {spec.name: _decoder(spec, self.manifest.shards) for spec in self._specs}
            for decoder in self._decoders.values():
                decoder.require_document(self._store)
            self.shard_starts = self._read_starts(count)
        except CacheFormatError as error:
            raise CacheFormatError(f"{self.path}: {error}; run logitcask cache verify") from error
        self._kept_bytes = kept_bytes
        self.keep(SHARDS_KEPT)
        self._decoded: dict[int, Shard] = {}
        self._keeping = threading.Lock()
        self.decodes = 0

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def keep(self, shards: int) -> None:
        """Keep up to so many decoded shards in memory from now on, as far as ``kept_bytes`` allows."""
        size = shard_bytes(self.manifest.label, self.manifest.shards)
        self._keep = max(1, min(shards, self._kept_bytes // size))

    def shard(self, index: int) -> Shard:
        """Return a whole shard; the last few stay in memory. Raises CacheFormatError if it is damaged."""
        shard = self._decoded.get(index)
        if shard is None:
            with self._keeping:  # room is made before, so that no more are in memory than are kept
                while len(self._decoded) >= self._keep:
                    del self._decoded[next(iter(self._decoded))]
            shard = self._read_shard(index)
            with self._keeping:
                self._decoded[index] = shard
                self.decodes += 1
        return shard

    def example(self, index: int) -> Example:
        """Return an example by its index in the cache. Raises CacheFormatError if its shard is damaged."""
        shard = int(np.searchsorted(self.shard_starts, index, side="right")) - 1
        return self.shard(shard).example(index - int(self.shard_starts[shard]))

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files, by name. Raises CacheFormatError if one is damaged."""
        files = {}
        for name, wanted in self.manifest.tokenizer.files.items():
            key = f"tokenizer/{name}"
            try:
                data = self._constant(key, self._length(key), "uint8").tobytes()
            except CacheFormatError as error:
                raise CacheFormatError(f"{self.path}: {error}; run logitcask cache verify") from error
            if sha256(data) != wanted:
                raise CacheFormatError(f"{self.path}: {key} is damaged: its digest differs from the manifest's")
            files[name] = data
        return files

    def teacher_head(self) -> TeacherHead:
        """Return the teacher's head, which exact labels need.

        Raises CacheFormatError if it is damaged, or if the cache has none.
        """
        label, identity = self.manifest.label, self.manifest.teacher_head
        if identity is None:
            raise CacheFormatError(
                f"{self.path}: holds sparse labels, without the teacher's head: exact ones are made by "
                "logitcask precompute-logits --preset exact"
            )
        try:
            arrays = {name: read_array(self._store, name, each) for name, each in layouts(label, identity).items()}
            return head_of(identity, arrays)
        except CacheFormatError as error:
            raise CacheFormatError(f"{self.path}: {error}; run logitcask cache verify") from error

    def shard_fidelity(self, index: int) -> FidelitySums:
        """Return a shard's row of the fidelity certificate. Raises CacheFormatError if it is damaged or missing."""
        if "fidelity" not in self._decoders:
            raise CacheFormatError(
                f"{self.path}: has no fidelity certificate: make it with --fidelity-positions above 0"
            )
        with self._naming_shard(index):
            row = FidelitySums(self._row("fidelity", index).astype(np.float64))
            label, most = self.manifest.label, self.manifest.shards.positions
            problem = unsound(row, len(label.temperatures), most, exact=label.exact is not None)
            if problem:
                raise CacheFormatError(problem)
        return row

    def shard_projection(self, index: int) -> NDArray[np.float64]:
        """Return the sums of a shard's labels in another vocabulary, (3,).

        Bytes of the labelled tokens, their nats by the labels, and by projection alone. Raises CacheFormatError if they
        are damaged.
        """
        with self._naming_shard(index):
            sums = self._row("projection", index).astype(np.float64)
            if not (np.isfinite(sums).all() and sums.min() >= 0):
                raise CacheFormatError("projection: must be finite numbers that are not negative")
        return sums

    def made_by(self, index: int) -> MadeBy | None:
        """Return what labelled a shard, None if that is not recorded. Raises CacheFormatError if it is damaged."""
        if "made_by" not in self._decoders:
            teacher = self.manifest.teacher
            return MadeBy(engine=teacher.engine, device="", versions=teacher.versions or {})
        with self._naming_shard(index):
            return decode_made_by(self._row("made_by", index))

    def counts(self, name: str, shards: range) -> IntArray:
        """Return ``token_count``, ``position_count`` or a column's codes of all examples of some shards.

        Reads one object per shard.
        """
        position = self._position(name)
        parts = []
        for index in shards:
            with self._naming_shard(index, whole=False):
                record = commit_record(self._store, self._specs, index)
                examples = int(self.shard_starts[index + 1] - self.shard_starts[index])
                parts.append(self._slots(position, index, record, examples).astype(np.int64))
        self._require_unchanged()
        return np.concatenate(parts)

    def _read_shard(self, index: int) -> Shard:
        with self._naming_shard(index):
            record = commit_record(self._store, self._specs, index)
            plan = self.manifest.shards
            examples = int(self.shard_starts[index + 1] - self.shard_starts[index])
            arrays = self._arrays("example", index, record, examples)
            tokens, positions = (int(arrays[f"{name}_count"].sum(dtype=np.int64)) for name in ("token", "position"))
            if tokens > plan.tokens or positions > plan.positions:
                raise CacheFormatError(
                    f"must hold at most {plan.tokens} tokens and {plan.positions} positions, "
                    f"got {tokens} and {positions}"
                )
            arrays |= self._arrays("token", index, record, tokens) | self._arrays("position", index, record, positions)
            shard = Shard(
                token_count=arrays.pop("token_count").astype(np.int64),
                position_count=arrays.pop("position_count").astype(np.int64),
                input_ids=arrays.pop("input_ids"),
                target_mask=arrays.pop("target_mask").astype(bool),
                metadata={name: arrays.pop(name).astype(np.int64) for name in metadata_values(self.manifest)},
                targets=decode_targets(arrays, self.manifest.label),
            )
            arrays.clear()  # the codes
            for problem in unusable(shard, self.manifest):
                raise CacheFormatError(problem)
        return shard

    def _arrays(self, axis: Axis, index: int, record: bytes, count: int) -> dict[str, NDArray[Any]]:
        """Return the first ``count`` slots of a shard in all arrays of an axis, reading several at a time."""
        chosen = [i for i, spec in enumerate(self._specs) if spec.axis == axis]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            arrays = threads.map(lambda i: self._slots(i, index, record, count), chosen)
            return {self._specs[i].name: values for i, values in zip(chosen, arrays, strict=True)}

    def _slots(self, position: int, index: int, record: bytes, count: int) -> NDArray[Any]:
        """Return the first ``count`` slots of a shard in the array at ``position`` of the specs, checked by digest."""
        spec = self._specs[position]
        key = shard_keys([spec], index)[0]
        data = read_verified(self._store, key, record[32 * position : 32 * position + 32])
        return self._decoders[spec.name].decode(key, data, count)

    def _row(self, name: str, index: int) -> NDArray[Any]:
        """Return a shard's row of an array with the axis ``shard``."""
        record = commit_record(self._store, self._specs, index)
        row: NDArray[Any] = self._slots(self._position(name), index, record, 1)[0]
        return row

    def _position(self, name: str) -> int:
        return [spec.name for spec in self._specs].index(name)

    @contextlib.contextmanager
    def _naming_shard(self, index: int, *, whole: bool = True) -> Iterator[None]:
        """Name the shard in errors, and check after the reads (``whole``) that they were of the cache that was opened.

        A cache that takes another's place has its manifest before its first commit record.
        """
        try:
            yield
            if whole:
                self._require_unchanged()
        except CacheFormatError as error:
            self._require_unchanged()
            raise CacheFormatError(
                f"{self.path}: shard {index} is damaged: {error}; run logitcask cache verify --repair"
            ) from error

    def _require_unchanged(self) -> None:
        """Raise CacheMismatchError if the manifest is no longer the one that was opened."""
        if digest(self._store, "zarr.json") != self.opened:
            raise CacheMismatchError(
                f"{self.path}: was replaced by another cache, or removed, while it was read: start again"
            )

    def _read_starts(self, count: int) -> IntArray:
        examples = self._constant("shard_examples", count, "int64").astype("<i8")
        plan, total = self.manifest.shards, self.manifest.data.examples
        if sha256(examples.tobytes()) != plan.digest:
            raise CacheFormatError("shard_examples is damaged: its digest differs from the manifest's")
        if int(examples.min()) < 1 or int(examples.max()) > plan.examples or int(examples.sum()) != total:
            raise CacheFormatError(f"shard_examples: must be 1 to {plan.examples} per shard and {total} in total")
        return np.concatenate([[0], np.cumsum(examples)]).astype(np.int64)

    def _constant(self, name: str, length: int, dtype: str) -> NDArray[Any]:
        """Return an array outside the shards, which must have this length."""
        decoder = Decoder(name, constant_layout(length, dtype))
        decoder.require_document(self._store)
        data = read_bounded(self._store, f"{name}/c/0")
        if data is None:
            raise CacheFormatError(f"{name}/c/0: missing")
        return decoder.decode(f"{name}/c/0", data, length)

    def _length(self, name: str) -> int:
        """Return the length of a tokenizer file from its array's metadata: the manifest does not record it."""
        shape = (read_json(self._store, f"{name}/zarr.json") or {}).get("shape")
        if not (isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int)):
            raise CacheFormatError(f"array {name} is missing")
        if not 0 <= shape[0] <= MAX_TOKENIZER_FILE:
            raise CacheFormatError(f"array {name} must be at most {MAX_TOKENIZER_FILE} bytes, got {shown(shape[0])}")
        return shape[0]
