"""Digests: of each object of a shard in its commit record, of every other object in the array ``seal``.

Any changed, truncated or missing object of a cache has a digest that differs. Digests are SHA-256 of the stored bytes,
so that a copy can be checked without decoding it.
"""

import hashlib
import os
from collections.abc import Collection
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from logitcask.cache.errors import CacheFormatError
from logitcask.cache.exact.head import head_objects
from logitcask.cache.layout import ArraySpec, shard_specs
from logitcask.cache.manifest import Manifest
from logitcask.cache.storage.bounded import MAX_OBJECT, read_bounded
from logitcask.cache.storage.open import list_objects
from logitcask.cache.storage.remote import RemoteStore

SEAL = "seal"
CONSTANT_LEVEL = 9  # of zstd, for arrays written once
SEAL_OBJECTS = (f"{SEAL}/zarr.json", f"{SEAL}/c/0/0")


def shard_keys(specs: list[ArraySpec], index: int) -> list[str]:
    """Return the keys of the objects that hold shard ``index``, one per array."""
    return [f"{spec.name}/c/{index}" + ("/0" if spec.width else "") for spec in specs]


def commit_key(index: int) -> str:
    """Return the key of the object that holds the commit record of shard ``index``."""
    return f"commits/c/{index}/0"


def digest(store: Store, key: str) -> bytes | None:
    """Return the SHA-256 of an object, None if it is missing. Raises CacheFormatError if it is not a plain file."""
    data = read_bounded(store, key)
    return None if data is None else hashlib.sha256(data).digest()


def digests(store: Store, keys: list[str]) -> NDArray[np.uint8]:
    """Return the digests of objects that were just written, (len(keys), 32)."""
    hashes = [digest(store, key) for key in keys]
    missing = [key for key, value in zip(keys, hashes, strict=True) if value is None]
    assert not missing, f"vanished right after they were written: {missing}"
    return np.frombuffer(b"".join(value for value in hashes if value is not None), dtype=np.uint8).reshape(-1, 32)


def damage(store: Store, keys: list[str], wanted: bytes) -> list[str]:
    """Return a line per object that differs from the wanted digests (concatenated): missing, or bytes differ."""
    if len(wanted) != 32 * len(keys):
        return [f"{key}: no digest to check it against" for key in keys]
    wrong = []
    for i, key in enumerate(keys):
        try:
            have = digest(store, key)
        except CacheFormatError as error:
            wrong.append(str(error))
        else:
            if have != wanted[32 * i : 32 * i + 32]:
                wrong.append(f"{key}: {'missing' if have is None else 'bytes differ'}")
    return wrong


def shard_damage(store: Store, specs: list[ArraySpec], index: int) -> list[str]:
    """Return what is wrong with the objects of a committed shard; empty if nothing is."""
    try:
        return damage(store, shard_keys(specs, index), commit_record(store, specs, index))
    except CacheFormatError as error:
        return [str(error)]


def commit_record(store: Store, specs: list[ArraySpec], index: int) -> bytes:
    """Return the concatenated digests of a shard's objects. Raises CacheFormatError if the shard is not committed."""
    record = read_bounded(store, commit_key(index), 32 * len(specs))
    if record is None:
        raise CacheFormatError(f"{commit_key(index)}: missing: the shard is not committed")
    if len(record) != 32 * len(specs):
        raise CacheFormatError(f"{commit_key(index)}: truncated: must be {32 * len(specs)} bytes, got {len(record)}")
    return record


def read_verified(store: Store, key: str, wanted: bytes) -> bytes:
    """Return an object whose digest must be ``wanted``. Raises CacheFormatError if it is missing or differs."""
    disk_cache = store.disk_cache if isinstance(store, RemoteStore) else None
    copy = disk_cache.get(wanted, MAX_OBJECT) if disk_cache else None
    if copy is not None and hashlib.sha256(copy).digest() == wanted:
        return copy
    data = read_bounded(store, key)
    if data is None or hashlib.sha256(data).digest() != wanted:
        raise CacheFormatError(f"{key}: {'missing' if data is None else 'bytes differ'}")
    if disk_cache:
        disk_cache.put(wanted, data)
    return data


def constant_objects(manifest: Manifest, tokenizer_files: Collection[str] | None = None) -> list[str]:
    """Return the keys of all objects that belong to no shard, except the seal's own content.

    ``tokenizer_files`` are those of the manifest if they are not given.
    """
    files = manifest.tokenizer.files if tokenizer_files is None else tokenizer_files
    specs, (head_metadata, head) = shard_specs(manifest), head_objects(manifest)
    arrays = [*(spec.name for spec in specs), "commits", "shard_examples", *(f"tokenizer/{f}" for f in files)]
    groups = ["zarr.json", *(["tokenizer/zarr.json"] if files else [])]
    metadata = [*groups, *(f"{name}/zarr.json" for name in arrays), *head_metadata, SEAL_OBJECTS[0]]
    return [*metadata, "shard_examples/c/0", *(f"tokenizer/{name}/c/0" for name in files), *head]


def constant_layout(length: int, dtype: str) -> dict[str, Any]:
    """Return the arguments of ``create_array`` for a small array that is written once, in one object."""
    return {
        "shape": (length,),
        "chunks": (max(1, length),),
        "dtype": dtype,
        "compressors": ZstdCodec(level=CONSTANT_LEVEL),
    }


def write_seal(root: zarr.Group, objects: list[str]) -> None:
    """Write the digests of the objects outside the shards, which include the seal's own metadata."""
    array: zarr.Array[Any] = root.create_array(
        SEAL,
        shape=(len(objects), 32),
        chunks=(len(objects), 32),
        dtype="uint8",
        compressors=None,
        fill_value=0,
        dimension_names=("object", "byte"),
        attributes={"meaning": "SHA-256 of each object outside the shards", "objects": objects},
    )
    array[:] = digests(root.store, objects)


def constant_damage(store: Store, objects: list[str]) -> list[str]:
    """Return what is wrong with the objects outside the shards; empty if nothing is."""
    try:
        sealed = read_bounded(store, SEAL_OBJECTS[1], 32 * len(objects))
    except CacheFormatError as error:
        return [str(error)]
    if sealed is None:
        return [f"{SEAL_OBJECTS[1]}: missing"]
    return damage(store, objects, sealed)


def committed_shards(store: Store, count: int) -> set[int]:
    """Return those of ``count`` shards that have a commit record."""
    if isinstance(store, LocalStore):  # for 10,000 shards listing all keys takes a second, this a tenth of one
        folder = store.root / "commits" / "c"
        names = [name for name in os.listdir(folder) if os.path.isfile(f"{folder}/{name}/0")] if folder.is_dir() else []
    else:
        keys = (key.split("/") for key in list_objects(store, "commits/c/"))
        names = [key[2] for key in keys if len(key) == 4 and key[3] == "0"]
    indices = {int(name) for name in names if name.isascii() and name.isdecimal() and name == str(int(name[:8]))}
    return {index for index in indices if index < count}
