"""Writing the shards of a cache: whole, committed last. What is not committed does not exist."""

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
    """Writes shards of a cache that ``create_cache`` began. Several processes may, of different shards."""

    def __init__(self, path: str | Path, manifest: Manifest, *, shards: Collection[int] | None = None) -> None:
        """``shards`` are this writer's, all by default."""
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
        """This writer's shards that are not committed yet, in order."""
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


def require_array(root: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array that is known to be there."""
    found = root[name]
    assert isinstance(found, zarr.Array)
    return found


def plan_digest(shard_examples: NDArray[np.int64]) -> str:
    """The digest of a shard plan, as the manifest keeps it."""
    return sha256(shard_examples.astype("<i8").tobytes())


def create_cache(
    path: str | Path,
    manifest: Manifest,
    shard_examples: NDArray[np.int64],
    tokenizer_files: dict[str, bytes],
    *,
    overwrite: bool = False,
    shards: Collection[int] | None = None,
) -> CacheWriter:
    """Create a cache, or take up an interrupted one made from the same inputs; returns the writer of its shards.

    Raises CacheMismatchError, listing every difference, where another cache lies there, and LogitcaskError where
    a complete one does, unless ``overwrite``. ``shards`` are this writer's, of those of a cache that others write
    at the same time, each under ``sole_writer`` of its part.
    """
    alone = shards is None
    with explain_write_errors(path), contextlib.nullcontext() if alone else setting_up(path):
        store = open_store(path, read_only=False)
        check_output(path, dict(manifest), overwrite=overwrite, alone=alone)
        if overwrite and not is_empty(store):
            sync(store.clear())
        specs = array_specs(manifest.label)
        mine, shared = set(shards or ()), {"commits", *(spec.name for spec in specs)}
        drop_partial_objects(store, lambda key: not alone and _is_of_others(key, mine, shared))
        # An object is written even where it is all zeros: its digest stands in the commit record.
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


def _is_of_others(key: str, mine: Collection[int], shared: Collection[str]) -> bool:
    """Whether a half-written object belongs to a shard that another process may be writing now."""
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
    """A small array written once, whole, in one object."""
    if name not in root:
        root.create_array(name, **constant_layout(len(data), data.dtype.name))
    require_array(root, name)[:] = data


def check_output(path: str | Path, wanted: Mapping[str, Any], *, overwrite: bool, alone: bool = True) -> None:
    """Whether a cache with these parts of a manifest may be written there.

    Raises CacheFormatError where something else lies there, CacheMismatchError, listing every difference, for another
    cache, and LogitcaskError for a complete one; the last two not with ``overwrite``. A part's run (not
    ``alone``) has nothing to do in a complete cache, but is no mistake.
    """
    if not is_url(path) and not Path(path).exists():
        return
    store = open_store(path, read_only=True)
    if is_empty(store):
        return  # nothing, or killed before the manifest was there
    found = read_manifest(store, str(path))
    if overwrite:
        return
    if alone and len(committed_shards(store, found.shards.count)) == found.shards.count:
        raise LogitcaskError(f"{path}: the cache is complete already; pass --overwrite to make it again")
    there = {name: value for name, value in dict(found).items() if name in wanted}
    wrong = differences(flatten(there), flatten(wanted))
    if wrong:
        raise CacheMismatchError(
            f"{path}: holds a cache made otherwise: {'; '.join(wrong)}; choose another --output or --overwrite"
        )
