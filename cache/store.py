"""Where a cache lies: opening a Zarr store, and the few raw object operations that commits need."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from cache.errors import CacheFormatError, LogitcaskError


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


def read_object(store: Store, key: str) -> bytes | None:
    """The bytes of one object, None where it is missing."""
    buffer = sync(store.get(key, prototype=default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


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


def drop_partial_objects(store: Store) -> None:
    """Remove what a killed process left half written (Zarr writes ``*.partial`` and renames)."""
    if isinstance(store, LocalStore):
        for left in Path(store.root).rglob("*.partial"):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(path: str | Path) -> Iterator[Path]:
    """Hold the right to write a cache, by a lock on a file beside it that the system drops when the process ends.

    Gives an empty folder beside the cache for what the run stages; what a killed run left there is removed.
    Raises LogitcaskError where another run holds it: two writers in one shard lose data silently.
    """
    folder = Path(path)
    with explain_write_errors(path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                raise BlockingIOError("the holder ended, and another took its place, while we waited")
        except OSError as error:
            raise LogitcaskError(f"{path}: another run is writing this cache: wait for it or stop it") from error
        staging = folder.parent / f".{folder.name}.staging"
        try:
            with explain_write_errors(path):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        raise LogitcaskError(
            f"{path}: cannot write the cache: {error.strerror or error}; committed shards are kept: "
            "mend that and run the same command again to finish"
        ) from error
