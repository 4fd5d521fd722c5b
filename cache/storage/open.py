"""Opening the Zarr store of a cache, and the few raw object operations that commits need."""

import asyncio
import contextlib
import os
import shutil
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, ZipStore

from logitcask.cache.errors import CacheFormatError, LogitcaskError, shown
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.cache.storage.remote import RemoteStore
from logitcask.cache.storage.url import is_url

REASON = 200  # characters of zipfile's message shown: it quotes names from the file, of up to 64 kB
CONCURRENT = 64  # local objects whose sizes are queried at once
NAMED = 3  # names of other files that a message quotes
OWN = ".logitcask"  # a run's lock and staging folder, where they lie inside the cache's folder
SYSTEM_NAMES = frozenset(  # what systems, desktops and the hub put into any folder or volume
    {
        *("lost+found", ".DS_Store", ".Trashes", ".fseventsd", ".Spotlight-V100", ".TemporaryItems", "__MACOSX"),
        *(".gitattributes", "README.md"),  # of a repository on the hub
        *("System Volume Information", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini", ".directory", "@eaDir", ".snapshot"),
    }
)


def open_store(path: str | Path, *, read_only: bool, disk_cache: DiskCache | None = None) -> Store:
    """Return the Zarr store in a folder, in a .zip file (read only) or at a URL (cached in ``disk_cache``).

    Raises CacheFormatError if there is no cache to read, LogitcaskError if the URL is one that cannot be opened.
    """
    if is_url(path):
        if str(path).endswith(".zip"):
            raise LogitcaskError(f"{path}: a .zip file must be on this machine: download it first")
        return RemoteStore(str(path), read_only=read_only, disk_cache=disk_cache)
    folder = Path(os.path.realpath(path))  # which stays the same if the working directory changes
    if read_only and not folder.exists():
        raise CacheFormatError(f"{path}: no such cache; make one with logitcask precompute-logits")
    if is_zip(path) and folder.is_file() and read_only:
        return _open_zip(folder, str(path))
    if folder.exists() and not folder.is_dir():
        raise CacheFormatError(f"{path}: not a logit cache: must be a folder or a .zip file")
    return _Folder(folder, read_only=read_only)


def is_zip(path: str | Path) -> bool:
    """Return whether a path on this machine names a .zip file, there or not."""
    return Path(path).suffix.lower() == ".zip"


class _Folder(LocalStore):
    """A folder, less what a run or the system keeps in it.

    Zarr's own listing drops the folder's name from inside keys too (``commits/c/0/0`` in a folder ``c``), and its
    ``clear`` removes the folder itself, which fails for a volume.
    """

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        stem = f"{self.root.as_posix().rstrip('/')}/"
        for place in (self.root / prefix.rstrip("/")).rglob("*"):
            key = place.as_posix().removeprefix(stem)
            if not _is_ignored(key.partition("/")[0]) and place.is_file():
                yield key

    async def clear(self) -> None:
        self._check_writable()
        for place in self.root.iterdir():
            if _is_ignored(place.name):
                continue
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()


class _CheckedZip(ZipStore):
    """A zip file whose damage raises CacheFormatError. ``below`` is where the cache is in it: "" or "FOLDER/"."""

    below = ""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            return await super().get(f"{self.below}{key}", prototype, byte_range)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise CacheFormatError(f"{key}: damaged in the .zip file: {str(error)[:REASON]}") from error

    async def getsize(self, key: str) -> int:
        return int(self._zf.getinfo(f"{self.below}{key}").file_size)

    async def exists(self, key: str) -> bool:
        return await super().exists(f"{self.below}{key}")

    async def list(self) -> AsyncIterator[str]:
        for name in self._zf.namelist():
            if name.startswith(self.below) and not name.endswith("/"):
                yield name.removeprefix(self.below)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in super().list_dir(f"{self.below}{prefix}"):
            yield name


def _open_zip(path: Path, given: str) -> Store:
    store = _CheckedZip(path, mode="r")
    try:
        store._sync_open()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise CacheFormatError(
            f"{given}: not a logit cache: not a readable .zip file: {str(error)[:REASON]}"
        ) from error
    names = set(store._zf.namelist())
    if "zarr.json" not in names:  # as desktops pack a folder
        tops = {name.partition("/")[0] for name in names if "/" in name} - SYSTEM_NAMES
        store.below = next((f"{top}/" for top in tops if len(tops) == 1 and f"{top}/zarr.json" in names), "")
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
    """Return whether a store holds nothing but partial objects of a killed process and what systems put there."""
    return not _names(store)


def what_is_there(store: Store) -> str:
    """Return the end of a message on a store without a cache: that it is empty, or names of what is in it."""
    try:
        names = _names(store)
    except LogitcaskError:  # an object store that lets us read but not list
        return ""
    if not names:
        return "; it is empty"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"; it holds {', '.join(shown(name) for name in names[:NAMED])}{more}: give a cache's own folder"


def _names(store: Store) -> list[str]:
    async def look() -> list[str]:
        return [name async for name in store.list_dir("")]

    return sorted(name for name in sync(look()) if not _is_ignored(name) and not name.endswith(".partial"))


def _is_ignored(name: str) -> bool:
    """Return whether a name at the top of a cache is none of its objects, but the system's or a run's own."""
    return name in SYSTEM_NAMES or name.startswith((OWN, ".Trash-", "._"))


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


def remove_objects(store: Store, keys: list[str]) -> None:
    """Remove objects, and local folders that this leaves empty, durably: a power cut does not bring them back."""
    delete_objects(store, keys)
    if isinstance(store, LocalStore):
        folders = _folders(store.root, keys)
        for folder in folders[:-1]:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        for folder in folders:
            if folder.is_dir():
                _flush(folder)


def flush_objects(store: Store, keys: list[str]) -> None:
    """Flush local objects and their folders to the disk, so that a power cut loses none of them."""
    if isinstance(store, LocalStore):
        for place in (*(store.root / key for key in keys), *_folders(store.root, keys)):
            _flush(place)


def flush_names_above(folder: Path) -> None:
    """Flush the folders above a new one, as far as they can be read, so that a power cut does not lose it."""
    for above in folder.parents:
        with contextlib.suppress(OSError):
            _flush(above)


def _folders(root: Path, keys: list[str]) -> list[Path]:
    """Return the folders of objects, the deepest first and the root last."""
    folders = {folder for key in keys for folder in Path(key).parents} or {Path()}
    return [root / folder for folder in sorted(folders, key=lambda folder: -len(folder.parts))]


def _flush(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_partial_objects(store: Store, keep: Callable[[str], bool]) -> None:
    """Remove partial objects of a killed process (Zarr writes ``*.partial``, then renames), unless ``keep(key)``."""
    if isinstance(store, LocalStore):
        for partial in Path(store.root).rglob("*.partial"):
            key = partial.relative_to(store.root).as_posix()
            if not (key.startswith(OWN) or keep(key)):
                partial.unlink(missing_ok=True)
