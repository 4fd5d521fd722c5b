"""Ownership of a cache: one run at a time writes it, or each of its parts. Write errors become one-line messages.

A cache in a folder is owned through file locks: one file beside the cache is locked exclusively by a run of all shards
and shared by the runs of parts, each of which locks its part's file too. The file is inside the folder if that is a
volume or nothing can be written beside it. The system releases the locks when the process ends, however it ends. A
cache at a URL is owned through leases: each run keeps a small object beside the cache and renews it; a lease that is no
longer renewed expires.
"""

import contextlib
import errno
import itertools
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.open import OWN, delete_objects, write_objects
from logitcask.cache.storage.remote import RemoteStore, split_url
from logitcask.cache.storage.staging import begin_staging, end_staging, is_resumable, lock_file, temporary_folder
from logitcask.cache.storage.url import is_url

T = TypeVar("T")
Part = tuple[int, int]  # part i of n, from 1
SETUP_PATIENCE = 30.0  # seconds: clients of a network folder may see for 20 what another machine changed
LOCK_PATIENCE = 1.0  # seconds: the last of several parts holds the lock exclusively for a moment while it cleans up
RENEW_EVERY, EXPIRE_AFTER = 10.0, 30.0  # seconds between renewals of a lease; seconds without one until it expires
ALL_SHARDS = "all"  # in the name of a lease, in place of a part


@contextlib.contextmanager
def sole_writer(
    path: str | Path, part: Part | None = None, notify: Callable[[str], None] = lambda _: None
) -> Iterator[Path]:
    """Own a cache, or a part of its shards while other processes write other parts.

    Yields a staging folder beside the cache, for a URL one of the system's for temporary files, which is empty but for
    what a run that failed left to be resumed. Raises LogitcaskError if another run owns the cache: two writers of one
    shard lose data silently.
    ``notify`` gets a message before a wait, which happens only for a cache at a URL.
    """
    with contextlib.ExitStack() as stack:
        if is_url(path):
            stack.enter_context(_lease(str(path), part, notify))
            yield stack.enter_context(temporary_folder(f"{path} {part}"))
            return
        _require_outside(path)
        with explain_write_errors(path):
            Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
            stem = _stem(path)
            lock = stack.enter_context(_lock(path, stem, shared=part is not None))
        stack.callback(_clean_up, stem, lock, part)
        with explain_write_errors(path):
            folder = _staging(stem)
            if part is not None:
                stack.enter_context(_part_lock(path, folder, part))
                folder /= _part_name(part)
            begin_staging(folder)
        stack.push(partial(end_staging, folder))
        yield folder


@contextlib.contextmanager
def setting_up(path: str | Path) -> Iterator[None]:
    """Let the runs of parts of a cache create what belongs to no shard one at a time; wait for the turn."""
    if is_url(path):
        yield
        return
    with (_staging(_stem(path)) / "setup.lock").open("a+") as lock:
        lock_file(lock, wait=True)
        yield


def in_turn(path: str | Path, create: Callable[[], T]) -> T:
    """Return what ``create`` does for the run of a part, in its turn.

    Where the locks of another machine are not visible, as on some network folders, that machine may take what is being
    created for what a killed run left, and remove it: then it is created again.
    """
    deadline = time.monotonic() + SETUP_PATIENCE
    while True:
        try:
            with setting_up(path):
                return create()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.1, 1.0))  # so that two machines do not meet again


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn the system's refusals to write into a one-line LogitcaskError with a remedy."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise LogitcaskError(
            f"{path}: cannot write the cache: {error.strerror or error}{where}; committed shards are kept: "
            "fix that and run the same command again to finish"
        ) from error


def watch_folder(path: str | Path) -> Callable[[], None]:
    """Return a check, to be called later, that a cache's folder (or its parent, if it does not exist yet) is the same.

    The check raises FileNotFoundError if the folder was moved, removed or unmounted: Zarr would create another there.
    """
    if is_url(path):
        return lambda: None
    folder = Path(path) if Path(path).exists() else Path(path).parent
    before = os.stat(folder)

    def check() -> None:
        if not (folder.exists() and os.path.samestat(os.stat(folder), before)):
            raise FileNotFoundError(errno.ENOENT, "its folder was moved, removed or unmounted during the run")

    return check


def _require_outside(path: str | Path) -> None:
    """Raise LogitcaskError if a folder is inside a cache."""
    for parent in Path(os.path.realpath(path)).parents:
        if (parent / "zarr.json").exists() and (parent / "commits").exists():
            raise LogitcaskError(f"{path}: is inside the cache {parent}: choose a folder outside of it")


def _stems(path: str | Path) -> tuple[Path, Path]:
    """Return the beginning of the paths of the lock and the staging folder: beside the cache's folder, and inside."""
    folder = Path(os.path.realpath(path))
    return folder.parent / f".{folder.name}", folder / OWN


def _stem(path: str | Path) -> Path:
    """Return the one of ``_stems`` that a run uses: inside if that is a volume or its parent cannot be written.

    What lies beside a volume is not seen where the volume is mounted too, as in another container.
    """
    beside, inside = _stems(path)
    folder = inside.parent
    if not folder.is_dir():
        return beside
    return inside if os.path.ismount(folder) or not _may_write(folder.parent) else beside


def _may_write(place: Path) -> bool:
    return os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _staging(stem: Path) -> Path:
    return Path(f"{stem}.staging")


def _part_name(part: Part) -> str:
    return f"{part[0]}-of-{part[1]}"


def _lock(path: str | Path, stem: Path, *, shared: bool) -> IO[str]:
    """Return the locked file of a cache. Raises LogitcaskError if another run holds it, or the one in the other place.

    Users who can write beside a cache and users who cannot have their locks in different places.
    """
    deadline = time.monotonic() + LOCK_PATIENCE
    others = [Path(f"{other}.lock") for other in _stems(path) if other != stem]
    while True:
        late = time.monotonic() > deadline
        try:
            lock = _try_lock(Path(f"{stem}.lock"), others, shared=shared)
        except FileNotFoundError:  # clients of a network folder keep seeing for a while what another machine removed
            if late:
                raise
        else:
            if lock is not None:
                return lock
            if late:
                raise LogitcaskError(f"{path}: another run is writing this cache: wait for it or stop it")
        time.sleep(0.02)


def _try_lock(place: Path, others: list[Path], *, shared: bool) -> IO[str] | None:
    """Return the locked file; None if another run holds it, removed it meanwhile, or holds one of the others."""
    if any(map(_is_held, others)):
        return None
    lock = place.open("a+")
    try:
        lock_file(lock, shared=shared)
        if os.path.samestat(os.stat(place), os.fstat(lock.fileno())) and not any(map(_is_held, others)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None


def _clean_up(stem: Path, lock: IO[str], part: Part | None) -> None:
    """Remove the staging folder and the lock if this is the last run to end.

    Keep them while another part's folder is there: of a killed run, or of one on a machine whose locks are not visible
    here. What a run of all shards left to be resumed stays.
    """
    with contextlib.suppress(OSError):
        lock_file(lock)
        if part is None or not any(other.is_dir() for other in _staging(stem).glob(f"*-of-{part[1]}")):
            if part is not None or not is_resumable(_staging(stem)):
                shutil.rmtree(_staging(stem), ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


def _part_lock(path: str | Path, folder: Path, part: Part) -> IO[str]:
    """Return the locked file of a part, in the staging folder.

    Raises LogitcaskError if another run holds it, or holds a part of another number of parts.
    """
    folder.mkdir(exist_ok=True)
    with setting_up(path):
        for other in folder.glob("*-of-*.lock"):
            if not other.name.endswith(f"-of-{part[1]}.lock") and _is_held(other):
                raise LogitcaskError(
                    f"{path}: another run is writing part {other.stem.replace('-of-', '/')}, this is part "
                    f"{part[0]}/{part[1]}: wait for it or use the same number of parts"
                )
        lock = (folder / f"{_part_name(part)}.lock").open("a+")
        try:
            lock_file(lock)
        except BlockingIOError as error:
            lock.close()
            raise LogitcaskError(
                f"{path}: another run is writing part {part[0]}/{part[1]} of this cache: wait for it or stop it"
            ) from error
        return lock


def _is_held(file: Path) -> bool:
    """Return whether a run holds a lock file, which need not be there."""
    try:
        lock = file.open("r+" if _may_write(file) else "r")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with lock:
        try:
            lock_file(lock, shared=lock.mode == "r")
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def _lease(url: str, part: Part | None, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold a lease on the cache at a URL, or on a part of its shards while other runs write other parts.

    Raises LogitcaskError if another run's lease is renewed. There are no leases on the Hugging Face hub, which allows
    few commits per hour, and for a cache that is a whole bucket: there two runs at once are not refused, and write the
    same objects.
    """
    split_url(url)
    parent, _, name = url.rstrip("/").rpartition("/")
    if url.startswith("hf:") or parent.endswith("/"):
        yield
        return
    prefix = f".{name}.run-"
    mine = f"{prefix}{ALL_SHARDS if part is None else _part_name(part)}-{uuid.uuid4().hex}"
    store = RemoteStore(parent, read_only=False)
    single_try = RemoteStore(parent, read_only=False, tries=1)  # a failed renewal is not retried: the next one follows
    stop = threading.Event()
    write_objects(store, {mine: b"0"})
    renewal = threading.Thread(target=_renew, args=(single_try, mine, stop), daemon=True)
    renewal.start()
    try:
        _await_expiry(store, url, _conflicting_leases(store, prefix, mine), notify)
        yield
    finally:
        stop.set()
        renewal.join()
        with contextlib.suppress(LogitcaskError):
            delete_objects(single_try, [mine])


def _read(store: RemoteStore, name: str) -> bytes | None:
    buffer = sync(store.get(name, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


def _renew(store: RemoteStore, name: str, stop: threading.Event) -> None:
    for renewals in itertools.count(1):  # the first one immediately, since connecting may take long
        with contextlib.suppress(LogitcaskError):
            write_objects(store, {name: str(renewals).encode()})
        if stop.wait(RENEW_EVERY):
            return


def _conflicting_leases(store: RemoteStore, prefix: str, mine: str) -> list[str]:
    """Return the names of other leases on shards that ``mine`` covers."""

    async def names() -> list[str]:
        return [name async for name in store.list_dir("") if name.startswith(prefix) and not name.startswith(mine)]

    return [name for name in sync(names()) if not _are_compatible(name.removeprefix(prefix), mine.removeprefix(prefix))]


def _are_compatible(one: str, other: str) -> bool:
    """Return whether two leases cover different parts of the same number of parts."""
    (part, _, _), (another, _, _) = one.rpartition("-"), other.rpartition("-")
    return ALL_SHARDS not in (part, another) and part != another and part.split("-")[-1] == another.split("-")[-1]


def _await_expiry(store: RemoteStore, url: str, leases: list[str], notify: Callable[[str], None]) -> None:
    """Wait until leases are given up or expire, and remove them. Raises LogitcaskError if one is renewed."""
    seen = {name: content for name in leases if (content := _read(store, name)) is not None}
    if seen:
        notify(
            f"{url}: another run has started to write this cache; if it shows no sign of life for {EXPIRE_AFTER:g} s, "
            "this run continues"
        )
    until = time.monotonic() + EXPIRE_AFTER
    while seen and time.monotonic() < until:
        time.sleep(RENEW_EVERY / 10)
        now = {name: _read(store, name) for name in seen}
        if any(content not in (None, seen[name]) for name, content in now.items()):
            raise LogitcaskError(f"{url}: another run is writing this cache: wait for it or stop it")
        seen = {name: content for name, content in now.items() if content is not None}
    delete_objects(store, list(seen))
