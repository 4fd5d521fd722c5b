"""Digests: of each object of a shard in its commit record, of every other object in the array ``seal``.

Any changed, cut or missing byte of a cache shows as a digest that differs. SHA-256 of the stored bytes, so that a copy
can be checked without decoding it.
"""

import hashlib

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store

from cache.layout import ArraySpec
from cache.store import list_objects, read_object

SEAL = "seal"
SEAL_OBJECTS = (f"{SEAL}/zarr.json", f"{SEAL}/c/0/0")


def shard_keys(specs: list[ArraySpec], index: int) -> list[str]:
    """The objects that hold shard ``index``, one an array."""
    return [f"{spec.name}/c/{index}" + ("/0" if spec.width else "") for spec in specs]


def commit_key(index: int) -> str:
    """The object that holds the commit record of shard ``index``."""
    return f"commits/c/{index}/0"


def digest(store: Store, key: str) -> bytes | None:
    """SHA-256 of an object's bytes, None where it is missing."""
    data = read_object(store, key)
    return None if data is None else hashlib.sha256(data).digest()


def digests(store: Store, keys: list[str]) -> NDArray[np.uint8]:
    """The digests of objects that were just written, (len(keys), 32)."""
    found = [digest(store, key) for key in keys]
    missing = [key for key, value in zip(keys, found, strict=True) if value is None]
    assert not missing, f"vanished right after they were written: {missing}"
    return np.frombuffer(b"".join(value for value in found if value is not None), dtype=np.uint8).reshape(-1, 32)


def damage(store: Store, keys: list[str], wanted: bytes) -> list[str]:
    """What differs from the wanted digests, laid end to end: ``key: missing`` or ``key: bytes differ``."""
    if len(wanted) != 32 * len(keys):
        return [f"{key}: no digest to check it by" for key in keys]
    found = [(key, digest(store, key), wanted[32 * i : 32 * i + 32]) for i, key in enumerate(keys)]
    return [f"{key}: {'missing' if have is None else 'bytes differ'}" for key, have, want in found if have != want]


def shard_damage(store: Store, specs: list[ArraySpec], index: int) -> list[str]:
    """What is wrong with the objects of a committed shard; empty where all is well."""
    record = read_object(store, commit_key(index))
    if record is None:
        return [f"{commit_key(index)}: missing: the shard is not committed"]
    return damage(store, shard_keys(specs, index), record)


def constant_objects(specs: list[ArraySpec], tokenizer_files: list[str]) -> list[str]:
    """Every object that belongs to no shard, but for the seal's own content."""
    arrays = [*(spec.name for spec in specs), "commits", "shard_examples", *(f"tokenizer/{f}" for f in tokenizer_files)]
    groups = ["zarr.json", *(["tokenizer/zarr.json"] if tokenizer_files else [])]
    metadata = [*groups, *(f"{name}/zarr.json" for name in arrays), SEAL_OBJECTS[0]]
    return [*metadata, "shard_examples/c/0", *(f"tokenizer/{name}/c/0" for name in tokenizer_files)]


def write_seal(root: zarr.Group, objects: list[str]) -> None:
    """Write the digests of the constant objects; the seal's own metadata is one of them."""
    if SEAL not in root:
        root.create_array(
            SEAL,
            shape=(len(objects), 32),
            chunks=(len(objects), 32),
            dtype="uint8",
            compressors=None,
            fill_value=0,
            dimension_names=("object", "byte"),
            attributes={"meaning": "SHA-256 of each object outside the shards", "objects": objects},
        )
    array = root[SEAL]
    assert isinstance(array, zarr.Array)
    array[:] = digests(root.store, objects)


def constant_damage(store: Store, objects: list[str]) -> list[str]:
    """What is wrong with the objects outside the shards."""
    sealed = read_object(store, SEAL_OBJECTS[1])
    if sealed is None:
        return [f"{SEAL_OBJECTS[1]}: missing"]
    return damage(store, objects, sealed)


def committed_shards(store: Store, count: int) -> set[int]:
    """Those of ``count`` shards that have a commit record."""
    keys = list_objects(store, "commits/c/")
    return {index for index in range(count) if commit_key(index) in keys}
