"""Folders for what a run works with: removed at its end, kept for the same run again if it fails and left a ledger."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from logitcask.cache.errors import LogitcaskError

FULL = 1 << 20  # bytes: with less free, a disk is taken for the one that is full
LEDGER = "ledger"  # in a folder that is to be resumed: what of it is whole


def lock_file(file: IO[Any] | int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file, or its descriptor, until it is closed.

    The file must be open for reading and writing: where locks are emulated, as on NFS, a shared lock needs the one and
    an exclusive lock the other. Raises BlockingIOError if another process holds it, unless ``wait``, OSError if the
    file system has no locks, LogitcaskError if the operating system has none.
    """
    try:
        import fcntl
    except ImportError as error:
        raise LogitcaskError("writing needs file locks, which this system lacks: use Linux or macOS") from error
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def is_resumable(folder: Path) -> bool:
    """Return whether a run left something to be resumed, in a folder or below it."""
    return any(True for _ in folder.rglob(LEDGER))


def begin_staging(folder: Path) -> None:
    """Make a folder, empty unless what a run left in it is to be resumed."""
    if not is_resumable(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        folder.mkdir()


def end_staging(
    folder: Path, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
) -> None:
    """Remove a folder, unless the run failed and left something to be resumed."""
    if error is None or not is_resumable(folder):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(run: str) -> Iterator[Path]:
    """Yield a folder in the system's for temporary files: the same to every run of this user with this name.

    While it is in use, or cannot be owned, it is one that no other run finds. Raises LogitcaskError if the
    disk is full.
    """
    with contextlib.ExitStack() as stack:
        yield _own(run, stack) or stack.enter_context(scratch_folder())


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in the system's for temporary files. Raises LogitcaskError if that disk is full."""
    with tempfile.TemporaryDirectory(prefix="logitcask-") as folder, _explain_full_disk():
        yield Path(folder)


@contextlib.contextmanager
def _explain_full_disk() -> Iterator[None]:
    place = tempfile.gettempdir()
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC or shutil.disk_usage(place).free >= FULL:
            raise
        raise LogitcaskError(
            f"{place}: no space is left there for temporary files: set TMPDIR to a folder on a larger disk"
        ) from error


def _own(run: str, stack: contextlib.ExitStack) -> Path | None:
    """Return the folder of a run, locked until the stack is left; None if it is locked or somebody else's."""
    if not hasattr(os, "getuid"):
        return None
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    home = Path(tempfile.gettempdir(), f"logitcask-{os.getuid()}-{name}")
    with contextlib.suppress(OSError, LogitcaskError):  # the latter if the system has no locks
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            return None
        with contextlib.ExitStack() as opened:
            lock = opened.enter_context((home / "lock").open("a+"))
            lock_file(lock)
            if not os.path.samestat(os.stat(home / "lock"), os.fstat(lock.fileno())):
                return None
            begin_staging(home / "files")
            stack.enter_context(opened.pop_all())
        stack.callback(_remove_unless_resumable, home)
        stack.push(lambda *failure: end_staging(home / "files", *failure))
        stack.enter_context(_explain_full_disk())
        return home / "files"
    return None


def _remove_unless_resumable(home: Path) -> None:
    if not is_resumable(home / "files"):
        shutil.rmtree(home, ignore_errors=True)
