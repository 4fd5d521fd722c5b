"""Reading a cache: by example or by shard, in any order. A shard that is not committed is not there."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store

from cache.errors import CacheFormatError, IncompleteCacheError
from cache.integrity import committed_shards, shard_damage
from cache.layout import ArraySpec, array_specs, decode_targets, zarr_layout
from cache.manifest import Manifest, parse_manifest, sha256
from cache.shard import Example, Shard
from cache.store import open_store
from cache.targets import IntArray

SHARDS_KEPT = 2  # decoded shards held in memory: a batch may straddle two


def read_manifest(store: Store, where: str) -> Manifest:
    """The manifest of the cache in a store. Raises CacheFormatError where there is none."""
    try:
        group = zarr.open_group(store, mode="r", zarr_format=3)
    except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
        raise CacheFormatError(f"{where}: not a logit cache: no Zarr v3 group with a manifest in it") from error
    return parse_manifest(dict(group.attrs), where)


def is_complete(path: str | Path) -> bool:
    """Whether a complete, readable cache lies there."""
    try:
        CacheReader(path)
    except (CacheFormatError, IncompleteCacheError):
        return False
    return True


class CacheReader:
    """A complete cache, opened for reading.

    ``manifest`` says what it was made from; ``shard_starts`` (S + 1,) gives the first example of each shard.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        """Open a cache.

        Raises CacheFormatError where it is none, IncompleteCacheError where shards are missing, unless ``partial``.
        """
        self.path = str(path)
        self._store = open_store(path, read_only=True)
        self.manifest = read_manifest(self._store, self.path)
        self._root = zarr.open_group(self._store, mode="r", zarr_format=3)
        count = self.manifest.shards.count
        done = committed_shards(self._store, count)
        if len(done) < count and not partial:
            raise IncompleteCacheError(
                f"{self.path}: {len(done)} of {count} shards are committed: finish it with the same "
                "logitcask precompute-logits command that began it"
            )
        examples = self._constant("shard_examples", limit=count).astype("<i8")
        if len(examples) != count or sha256(examples.tobytes()) != self.manifest.shards.digest:
            raise CacheFormatError(f"{self.path}: shard_examples is damaged: its digest is not the manifest's")
        self.shard_starts: IntArray = np.concatenate([[0], np.cumsum(examples)]).astype(np.int64)
        self._specs = array_specs(self.manifest.label)
        self._arrays = {spec.name: self._array(spec) for spec in self._specs}
        self._decoded = functools.lru_cache(maxsize=SHARDS_KEPT)(self._read_shard)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def shard(self, index: int) -> Shard:
        """A whole shard; the last few read are kept in memory."""
        return self._decoded(index)

    def example(self, index: int) -> Example:
        """An example by its place in the cache."""
        shard = int(np.searchsorted(self.shard_starts, index, side="right")) - 1
        return self.shard(shard).example(index - int(self.shard_starts[shard]))

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name. Raises CacheFormatError where one is damaged."""
        files = {}
        for name, digest in self.manifest.tokenizer.files.items():
            data = self._constant(f"tokenizer/{name}", limit=1 << 28).astype(np.uint8).tobytes()
            if sha256(data) != digest:
                raise CacheFormatError(f"{self.path}: tokenizer/{name} is damaged: its digest is not the manifest's")
            files[name] = data
        return files

    def token_counts(self) -> IntArray:
        """Tokens of every example, in order, shape (examples,)."""
        return self._per_example("token_count")

    def position_counts(self) -> IntArray:
        """Target positions of every example, in order, shape (examples,)."""
        return self._per_example("position_count")

    def _per_example(self, name: str) -> IntArray:
        slots = np.asarray(self._arrays[name][:]).reshape(self.manifest.shards.count, -1)
        used = np.arange(slots.shape[1])[None] < np.diff(self.shard_starts)[:, None]
        return slots[used].astype(np.int64)

    def _read_shard(self, index: int) -> Shard:
        wrong = shard_damage(self._store, self._specs, index)
        if wrong:
            raise CacheFormatError(
                f"{self.path}: shard {index} is damaged: {wrong[0]}; run logitcask cache verify --repair"
            )
        plan = self.manifest.shards
        examples = int(self.shard_starts[index + 1] - self.shard_starts[index])
        counts = {
            name: self._slots(name, index, plan.examples, examples).astype(np.int64)
            for name in ("token_count", "position_count")
        }
        length = {"token": int(counts["token_count"].sum()), "position": int(counts["position_count"].sum())}
        if length["token"] > plan.tokens or length["position"] > plan.positions:
            raise CacheFormatError(
                f"{self.path}: shard {index} is damaged: its examples do not fit it; run cache verify"
            )
        stride = {"token": plan.tokens, "position": plan.positions}
        found = {
            spec.name: self._slots(spec.name, index, stride[spec.axis], length[spec.axis])
            for spec in self._specs
            if spec.axis != "example"
        }
        return Shard(
            token_count=counts["token_count"],
            position_count=counts["position_count"],
            input_ids=found.pop("input_ids").astype(np.int64),
            target_mask=found.pop("target_mask").astype(bool),
            targets=decode_targets(found, self.manifest.label),
        )

    def _slots(self, name: str, shard: int, stride: int, count: int) -> NDArray[Any]:
        return np.asarray(self._arrays[name][shard * stride : shard * stride + count])

    def _array(self, spec: ArraySpec) -> zarr.Array[Any]:
        found = self._root.get(spec.name)
        want = zarr_layout(spec, self.manifest.shards)
        if not isinstance(found, zarr.Array):
            raise CacheFormatError(f"{self.path}: array {spec.name} is missing; run cache verify")
        wrong = [
            f"{key} {getattr(found, key)}"
            for key in ("shape", "chunks", "shards", "dtype")
            if getattr(found, key) != want[key]
        ]
        if wrong:
            raise CacheFormatError(f"{self.path}: array {spec.name} does not fit the manifest: {', '.join(wrong)}")
        return found

    def _constant(self, name: str, limit: int) -> NDArray[Any]:
        found = self._root.get(name)
        if not isinstance(found, zarr.Array) or found.ndim != 1 or found.shape[0] > limit:
            raise CacheFormatError(f"{self.path}: array {name} is missing or too large; run cache verify")
        return np.asarray(found[:])
