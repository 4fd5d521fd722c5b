"""Opening the Zarr store of a cache, and the few raw object operations that commits need."""

import asyncio
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, ZipStore

from logitcask.cache.errors import CacheFormatError, LogitcaskError
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.cache.storage.remote import RemoteStore

REASON = 200  # characters of zipfile's message shown: it quotes names from the file, of up to 64 kB
CONCURRENT = 64  # local objects whose sizes are queried at once


def is_url(path: str | Path) -> bool:
    """Return whether a cache's path is a URL, on another machine."""
    return isinstance(path, str) and "://" in path


def open_store(path: str | Path, *, read_only: bool, disk_cache: DiskCache | None = None) -> Store:
    """Return the Zarr store in a folder, in a .zip file (read only) or at a URL (cached in ``disk_cache``).

    Raises CacheFormatError if there is no cache to read, LogitcaskError if the URL is one that cannot be opened.
    """
    if is_url(path):
        if str(path).endswith(".zip"):
            raise LogitcaskError(f"{path}: a .zip file must be on this machine: download it first")
        return RemoteStore(str(path), read_only=read_only, disk_cache=disk_cache)
    folder = Path(path)
    if read_only and not folder.exists():
        raise CacheFormatError(f"{path}: no such cache; make one with logitcask precompute-logits")
    if folder.suffix == ".zip" and folder.is_file() and read_only:
        return _open_zip(folder)
    if folder.exists() and not folder.is_dir():
        raise CacheFormatError(f"{path}: not a logit cache: must be a folder or a .zip file")
    return LocalStore(folder, read_only=read_only)


class _CheckedZip(ZipStore):
    """A zip file whose damage raises CacheFormatError."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            return await super().get(key, prototype, byte_range)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise CacheFormatError(f"{key}: damaged in the .zip file: {str(error)[:REASON]}") from error

    async def getsize(self, key: str) -> int:
        return int(self._zf.getinfo(key).file_size)


def _open_zip(path: Path) -> Store:
    store = _CheckedZip(path, mode="r")
    try:
        store._sync_open()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise CacheFormatError(f"{path}: not a logit cache: not a readable .zip file: {str(error)[:REASON]}") from error
    return store


def write_objects(store: Store, objects: Mapping[str, bytes]) -> None:
    """Write several objects, each atomically, and flush local ones to the disk."""
    if isinstance(store, RemoteStore):
        store.set_all(objects)
        return
    for key, data in objects.items():
        sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))
    flush_objects(store, list(objects))


def is_empty(store: Store) -> bool:
    """Return whether a store holds nothing but partial objects of a killed process."""

    async def look() -> bool:
        return all([name.endswith(".partial") async for name in store.list_dir("")])

    return sync(look())


def object_sizes(store: Store) -> dict[str, int]:
    """Return the size of every object in bytes, by key."""

    async def ask() -> dict[str, int]:
        if isinstance(store, RemoteStore):
            return await store.sizes("")
        keys = [key async for key in store.list()]
        sizes: list[int] = []
        for start in range(0, len(keys), CONCURRENT):
            sizes += await asyncio.gather(*(store.getsize(key) for key in keys[start : start + CONCURRENT]))
        return dict(zip(keys, sizes, strict=True))

    return sync(ask())


def list_objects(store: Store, prefix: str) -> set[str]:
    """Return the keys of all objects below a prefix."""

    async def collect() -> set[str]:
        return {key async for key in store.list_prefix(prefix)}

    return sync(collect())


def delete_objects(store: Store, keys: list[str]) -> None:
    """Remove objects, in order; missing ones are skipped."""
    for key in keys:
        sync(store.delete(key))


def flush_objects(store: Store, keys: list[str]) -> None:
    """Flush local objects to the disk, so that no commit record survives a power cut that its objects did not."""
    if isinstance(store, LocalStore):
        for key in keys:
            for place in (store.root / key, (store.root / key).parent):
                handle = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def drop_partial_objects(store: Store, keep: Callable[[str], bool]) -> None:
    """Remove partial objects of a killed process (Zarr writes ``*.partial``, then renames), unless ``keep(key)``."""
    if isinstance(store, LocalStore):
        for partial in Path(store.root).rglob("*.partial"):
            if not keep(partial.relative_to(store.root).as_posix()):
                partial.unlink(missing_ok=True)
