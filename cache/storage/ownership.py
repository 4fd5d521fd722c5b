"""The right to write a cache, and the operating system's refusals told in one line.

One file beside the cache is locked whole by a run of all shards and shared by the runs of parts. The system drops a
lock when its process ends, however it ends.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.open import delete_objects, is_url, write_objects
from logitcask.cache.storage.remote import RemoteStore

Part = tuple[int, int]  # part i of n, from 1
PATIENCE = 1.0  # seconds: the last of several parts holds the lock whole for a moment while it cleans up


@contextlib.contextmanager
def sole_writer(
    path: str | Path, part: Part | None = None, tell: Callable[[str], None] = lambda _: None
) -> Iterator[Path]:
    """Hold the right to write a cache, or a part of its shards while other processes write other parts.

    Gives an empty folder beside the cache for what the run stages; what a killed run left there is removed.
    Raises LogitcaskError where another run holds it: two writers in one shard lose data silently. ``tell`` is told of a
    wait, which only a cache on another machine asks for.
    """
    with contextlib.ExitStack() as held:
        if is_url(path):
            held.enter_context(claimed(str(path), part, tell))
            yield Path(held.enter_context(tempfile.TemporaryDirectory(prefix="logitcask-")))
            return
        with explain_write_errors(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(_lock(path, fcntl.LOCK_EX if part is None else fcntl.LOCK_SH))
        held.callback(_leave, path, lock, part)
        with explain_write_errors(path):
            folder = _staging(path)
            if part is not None:
                held.enter_context(_part_lock(path, part))
                folder /= _part_name(part)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
            folder.mkdir()
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def setting_up(path: str | Path) -> Iterator[None]:
    """Among the runs of parts of a cache, let one at a time create what belongs to no shard. Waits its turn."""
    if is_url(path):
        yield
        return
    with (_staging(path) / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise LogitcaskError(
            f"{path}: cannot write the cache: {error.strerror or error}{where}; committed shards are kept: "
            "mend that and run the same command again to finish"
        ) from error


def watch_folder(path: str | Path) -> Callable[[], None]:
    """A check, to be called later, that a cache's folder (its parent where there is none yet) is still the one it is.

    The check raises FileNotFoundError where it was moved, removed or unmounted: Zarr would begin another in its place.
    """
    if is_url(path):
        return lambda: None
    folder = Path(path) if Path(path).exists() else Path(path).parent
    then = os.stat(folder)

    def check() -> None:
        if not (folder.exists() and os.path.samestat(os.stat(folder), then)):
            raise FileNotFoundError(errno.ENOENT, "its folder was moved, removed or unmounted during the run")

    return check


def _staging(path: str | Path) -> Path:
    return Path(path).parent / f".{Path(path).name}.staging"


def _part_name(part: Part) -> str:
    return f"{part[0]}-of-{part[1]}"


def _lock(path: str | Path, kind: int) -> IO[str]:
    """The locked file beside the cache. Raises LogitcaskError where another run holds it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            lock = (Path(path).parent / f".{Path(path).name}.lock").open("w")
        except FileNotFoundError:  # a client of a network folder remembers for a while what another machine removed
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                return lock
        except (BlockingIOError, FileNotFoundError):  # held, or its holder removed it while we waited
            pass
        except OSError:
            lock.close()
            raise
        lock.close()
        if time.monotonic() > deadline:
            raise LogitcaskError(f"{path}: another run is writing this cache: wait for it or stop it")
        time.sleep(0.02)


def _leave(path: str | Path, lock: IO[str], part: Part | None) -> None:
    """The last to leave removes the staging folder and the lock.

    Not while another part's folder is there: a killed run's, or of a run on a machine whose locks are not seen here.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if part is None or not any(each.is_dir() for each in _staging(path).glob(f"*-of-{part[1]}")):
            shutil.rmtree(_staging(path), ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


def _part_lock(path: str | Path, part: Part) -> IO[str]:
    """The locked file of a part. Raises LogitcaskError where a run holds it, or a part of another number of parts."""
    folder = _staging(path)
    folder.mkdir(exist_ok=True)
    with setting_up(path):
        for other in folder.glob("*-of-*.lock"):
            if not other.name.endswith(f"-of-{part[1]}.lock") and _is_held(other):
                raise LogitcaskError(
                    f"{path}: another run is writing part {other.stem.replace('-of-', '/')}, this is part "
                    f"{part[0]}/{part[1]}: wait for it or cut the shards as it does"
                )
        lock = (folder / f"{_part_name(part)}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise LogitcaskError(
                f"{path}: another run is writing part {part[0]}/{part[1]} of this cache: wait for it or stop it"
            ) from error
        return lock


def _is_held(file: Path) -> bool:
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


RENEWED, LOST = 10.0, 30.0  # seconds: between renewals; without one, until a run is taken for dead
WHOLE = "all"


@contextlib.contextmanager
def claimed(url: str, part: tuple[int, int] | None, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the right to write the cache at a URL, or a part of its shards while other runs write other parts.

    Raises LogitcaskError where a living run holds it. The Hugging Face hub, which allows few commits an hour, and a
    cache that is a whole bucket have no claims: there nothing refuses two runs at once, which write the same objects.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if url.startswith("hf:") or parent.endswith("/"):
        yield
        return
    prefix = f".{name}.run-"
    mine = f"{prefix}{WHOLE if part is None else f'{part[0]}-of-{part[1]}'}-{uuid.uuid4().hex}"
    hasty = RemoteStore(parent, read_only=False, tries=1)  # where a renewal fails, the next may not
    store, stop = RemoteStore(parent, read_only=False), threading.Event()
    write_objects(store, {mine: b"0"})
    renewal = threading.Thread(target=_renew, args=(hasty, mine, stop), daemon=True)
    renewal.start()
    try:
        _outlive(store, url, _others(store, prefix, mine), tell)
        yield
    finally:
        stop.set()
        renewal.join()
        with contextlib.suppress(LogitcaskError):
            delete_objects(hasty, [mine])


def _read(store: RemoteStore, name: str) -> bytes | None:
    found = sync(store.get(name, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def _renew(store: RemoteStore, name: str, stop: threading.Event) -> None:
    for renewals in itertools.count(1):  # the first at once: to connect may take long
        with contextlib.suppress(LogitcaskError):
            write_objects(store, {name: str(renewals).encode()})
        if stop.wait(RENEWED):
            return


def _others(store: RemoteStore, prefix: str, mine: str) -> list[str]:
    """Claims that one's own cannot stand beside."""

    async def names() -> list[str]:
        return [name async for name in store.list_dir("") if name.startswith(prefix) and not name.startswith(mine)]

    return [name for name in sync(names()) if not _side_by_side(name.removeprefix(prefix), mine.removeprefix(prefix))]


def _side_by_side(one: str, other: str) -> bool:
    """Whether two claims are of different parts of as many."""
    (part, _, _), (another, _, _) = one.rpartition("-"), other.rpartition("-")
    return WHOLE not in (part, another) and part != another and part.split("-")[-1] == another.split("-")[-1]


def _outlive(store: RemoteStore, url: str, claims: list[str], tell: Callable[[str], None]) -> None:
    """Wait until claims are withdrawn or given up for lost. Raises LogitcaskError where one is renewed."""
    seen = {name: content for name in claims if (content := _read(store, name)) is not None}
    if seen:
        tell(f"{url}: another run has begun to write this cache; without a sign of it for {LOST:g} s, this one goes on")
    until = time.monotonic() + LOST
    while seen and time.monotonic() < until:
        time.sleep(RENEWED / 10)
        now = {name: _read(store, name) for name in seen}
        if any(content not in (None, seen[name]) for name, content in now.items()):
            raise LogitcaskError(f"{url}: another run is writing this cache: wait for it or stop it")
        seen = {name: content for name, content in now.items() if content is not None}
    delete_objects(store, list(seen))
