"""Writing a cache: create it or resume it, then write its shards, each committed last.

``check_output`` refuses a place that holds anything else, ``create_cache`` writes what belongs to no shard, and
``CacheWriter`` the shards. A shard without a commit record does not exist for readers.
"""

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from logitcask.cache.errors import CacheMismatchError, LogitcaskError, differences
from logitcask.cache.integrity import (
    commit_key,
    committed_shards,
    constant_layout,
    constant_objects,
    digests,
    shard_keys,
    write_seal,
)
from logitcask.cache.labels import Shard
from logitcask.cache.layout import array_specs, encode_targets, strides, zarr_layout
from logitcask.cache.manifest import ATTRIBUTE, Manifest, flatten, sha256
from logitcask.cache.reader import read_manifest
from logitcask.cache.storage.open import drop_partial_objects, flush_objects, is_empty, is_url, open_store
from logitcask.cache.storage.ownership import explain_write_errors, setting_up, watch_folder


class CacheWriter:
    """Writes shards of a cache that ``create_cache`` created. Several processes may write different shards at once."""

    def __init__(self, path: str | Path, manifest: Manifest, *, shards: Collection[int] | None = None) -> None:
        """Open a cache for writing ``shards``, all of them by default."""
        self.path, self.manifest = path, manifest
        self._shards = set(range(manifest.shards.count) if shards is None else shards)
        self._specs = array_specs(manifest.label)
        zarr.config.set({"array.write_empty_chunks": True})
        with explain_write_errors(path):
            self._store = open_store(path, read_only=False)
            root = zarr.open_group(self._store, mode="r+", zarr_format=3)
            self._arrays = {name: require_array(root, name) for name in ("commits", *(s.name for s in self._specs))}
            self._require_folder = watch_folder(path)

    def missing_shards(self) -> list[int]:
        """Return this writer's shards that are not committed yet, in order."""
        return sorted(self._shards - committed_shards(self._store, self.manifest.shards.count))

    def write_shard(self, index: int, shard: Shard) -> None:
        """Write every object of a shard, then its commit record."""
        plan = self.manifest.shards
        values: dict[str, Any] = {
            "token_count": shard.token_count,
            "position_count": shard.position_count,
            "input_ids": shard.input_ids,
            "target_mask": shard.target_mask,
            **encode_targets(shard.targets),
        }
        if self.manifest.label.fidelity_positions:
            assert shard.fidelity is not None, "the manifest promises a certificate"
            values["fidelity"] = shard.fidelity.row[None]
        stride = strides(plan)
        keys = shard_keys(self._specs, index)
        with explain_write_errors(self.path):
            self._require_folder()
            for spec in self._specs:
                array, length = self._arrays[spec.name], stride[spec.axis]
                whole = np.zeros((length, *array.shape[1:]), dtype=spec.dtype)
                whole[: len(values[spec.name])] = values[spec.name]
                array[index * length : (index + 1) * length] = whole
            flush_objects(self._store, keys)
            self._require_folder()
            self._arrays["commits"][index] = digests(self._store, keys).reshape(-1)
            flush_objects(self._store, [commit_key(index)])
            self._require_folder()


def create_cache(
    path: str | Path,
    manifest: Manifest,
    shard_examples: NDArray[np.int64],
    tokenizer_files: dict[str, bytes],
    *,
    overwrite: bool = False,
    shards: Collection[int] | None = None,
) -> CacheWriter:
    """Create a cache, or resume an interrupted one made from the same inputs; return the writer of its shards.

    ``shards`` limits the writer to some shards while other processes write the rest, each under ``sole_writer`` of its
    part. Raises CacheMismatchError, listing every difference, if another cache is there, and LogitcaskError if a
    complete one is, unless ``overwrite``.
    """
    alone = shards is None
    with explain_write_errors(path), contextlib.nullcontext() if alone else setting_up(path):
        store = open_store(path, read_only=False)
        check_output(path, dict(manifest), overwrite=overwrite, alone=alone)
        if overwrite and not is_empty(store):
            sync(store.clear())
        specs = array_specs(manifest.label)
        mine, shared = set(shards or ()), {"commits", *(spec.name for spec in specs)}
        drop_partial_objects(store, lambda key: not alone and _belongs_to_others(key, mine, shared))
        # write objects that are all zeros too: the commit record holds their digests
        zarr.config.set({"array.write_empty_chunks": True})
        attributes: dict[str, Any] = {ATTRIBUTE: manifest.model_dump(mode="json")}  # one write with the group
        root = zarr.open_group(store, mode="a", zarr_format=3, attributes=attributes)
        for spec in specs:
            if spec.name not in root:
                root.create_array(spec.name, **zarr_layout(spec, manifest.shards), fill_value=0)
        _create_commits(root, manifest.shards.count, [spec.name for spec in specs])
        _constant(root, "shard_examples", shard_examples.astype("<i8"))
        for name, data in tokenizer_files.items():
            _constant(root, f"tokenizer/{name}", np.frombuffer(data, dtype=np.uint8))
        write_seal(root, constant_objects(specs, list(tokenizer_files)))
        return CacheWriter(path, manifest, shards=shards)


def check_output(path: str | Path, wanted: Mapping[str, Any], *, overwrite: bool, alone: bool = True) -> None:
    """Check that a cache with these parts of a manifest may be written to a path.

    Raises CacheFormatError if anything but a cache is there. Unless ``overwrite``, raises CacheMismatchError, listing
    every difference, if another cache is there, and LogitcaskError if a complete one is; a run of a part (not
    ``alone``) accepts a complete cache, in which it has nothing to do.
    """
    if not is_url(path) and not Path(path).exists():
        return
    store = open_store(path, read_only=True)
    if is_empty(store):
        return  # nothing was there, or a run was killed before it wrote the manifest
    stored = read_manifest(store, str(path))
    if overwrite:
        return
    if alone and len(committed_shards(store, stored.shards.count)) == stored.shards.count:
        raise LogitcaskError(f"{path}: the cache is complete already; pass --overwrite to make it again")
    parts = {name: value for name, value in dict(stored).items() if name in wanted}
    mismatches = differences(flatten(parts), flatten(wanted))
    if mismatches:
        raise CacheMismatchError(
            f"{path}: holds a cache made from other inputs: {'; '.join(mismatches)}; "
            "choose another --output or pass --overwrite"
        )


def plan_digest(shard_examples: NDArray[np.int64]) -> str:
    """Return the digest of a shard plan (examples per shard), as the manifest stores it."""
    return sha256(shard_examples.astype("<i8").tobytes())


def require_array(root: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array that is known to exist."""
    array = root[name]
    assert isinstance(array, zarr.Array)
    return array


def _belongs_to_others(key: str, mine: Collection[int], shared: Collection[str]) -> bool:
    """Return whether a partial object belongs to a shard that another process may be writing now."""
    name, *rest = key.split("/")
    return rest[:1] == ["c"] and name in shared and int(rest[1].split(".")[0]) not in mine


def _create_commits(root: zarr.Group, shards: int, arrays: list[str]) -> None:
    if "commits" in root:
        return
    width = 32 * len(arrays)
    root.create_array(
        "commits",
        shape=(shards, width),
        chunks=(1, width),
        dtype="uint8",
        compressors=None,
        fill_value=0,
        dimension_names=("shard", "byte"),
        attributes={"meaning": "SHA-256 of each object of the shard", "arrays": arrays},
    )


def _constant(root: zarr.Group, name: str, data: NDArray[Any]) -> None:
    """Write a small array in one object."""
    if name not in root:
        root.create_array(name, **constant_layout(len(data), data.dtype.name))
    require_array(root, name)[:] = data
