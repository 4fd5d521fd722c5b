"""Where a cache lies: opening a Zarr store, and the few raw object operations that commits need."""

import os
from collections.abc import Callable
from pathlib import Path

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from cache.errors import CacheFormatError


def open_store(path: str | Path, *, read_only: bool) -> Store:
    """The Zarr store in a folder.

    Raises CacheFormatError where a cache should be read and there is none.
    """
    folder = Path(path)
    if read_only and not folder.exists():
        raise CacheFormatError(f"{path}: no such cache; make one with logitcask precompute-logits")
    if folder.exists() and not folder.is_dir():
        raise CacheFormatError(f"{path}: not a logit cache: a cache is a folder, this is a file")
    return LocalStore(folder, read_only=read_only)


def list_objects(store: Store, prefix: str) -> set[str]:
    """Keys of all objects below a prefix."""

    async def collect() -> set[str]:
        return {key async for key in store.list_prefix(prefix)}

    return sync(collect())


def delete_objects(store: Store, keys: list[str]) -> None:
    """Remove objects, in order; those already gone are passed over."""
    for key in keys:
        sync(store.delete(key))


def flush_objects(store: Store, keys: list[str]) -> None:
    """Push local objects to the disk, so that a commit record never survives a power cut that they did not."""
    if isinstance(store, LocalStore):
        for key in keys:
            for place in (store.root / key, (store.root / key).parent):
                handle = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def drop_partial_objects(store: Store, keep: Callable[[str], bool]) -> None:
    """Remove what a killed process left half written (Zarr writes ``*.partial`` and renames), but for ``keep(key)``."""
    if isinstance(store, LocalStore):
        for left in Path(store.root).rglob("*.partial"):
            if not keep(left.relative_to(store.root).as_posix()):
                left.unlink(missing_ok=True)
