"""Writing the shards of a cache: whole, committed last. What is not committed does not exist."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from logitcask.cache.integrity import commit_key, committed_shards, digests, shard_keys
from logitcask.cache.layout import array_specs, encode_targets, strides
from logitcask.cache.lock import explain_write_errors, watch_folder
from logitcask.cache.manifest import Manifest
from logitcask.cache.shard import Shard
from logitcask.cache.store import flush_objects, open_store


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
            values["fidelity"] = shard.fidelity[None]
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
