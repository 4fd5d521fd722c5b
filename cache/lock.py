"""The right to write a cache, and the operating system's refusals told in one line."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cache.errors import LogitcaskError


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
