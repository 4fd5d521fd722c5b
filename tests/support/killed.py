"""A copy that is killed at a chosen write, and a run that is killed while it writes.

Separate from the tests, so that a new process starts quickly.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore

from logitcask.cache import copy
from logitcask.cache.copy import copy_cache
from logitcask.cache.storage import ownership, remote
from logitcask.cache.storage.ownership import sole_writer

Write = Callable[..., Coroutine[Any, Any, None]]


def copy_and_die(source: str, destination: str, writes: int) -> None:
    """Copy a cache and SIGKILL this process after ``writes`` objects."""
    left = [writes]

    def counted(write: Write) -> Write:
        async def one(*arguments: Any, **named: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            await write(*arguments, **named)

        return one

    for store in (LocalStore, remote.RemoteStore):
        store.set = counted(store.set)  # type: ignore[method-assign]
    copy_cache(source, destination, None)


def copy_and_die_packing(source: str, destination: str, steps: int) -> None:
    """Copy to a .zip file and SIGKILL this process inside ``pack``, after ``steps`` of its steps.

    The steps are each object, the flush, and the removal of the folder, after the file was renamed.
    """
    original, left = vars(copy)["pack"], [steps]

    def counted(step: Callable[..., object]) -> Callable[..., object]:
        def one(*arguments: Any, **named: Any) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **named)

        return one

    def pack(folder: Path, destination: Path) -> None:
        for module, name in ((shutil, "copyfileobj"), (os, "fsync"), (shutil, "rmtree")):
            setattr(module, name, counted(getattr(module, name)))
        original(folder, destination)

    vars(copy)["pack"] = pack
    copy_cache(source, destination, None)


QUICK = {"RENEW_EVERY": 0.2, "EXPIRE_AFTER": 12.0}  # seconds, in place of those in ownership


def hold(url: str, started: Event) -> None:
    """Own the cache at a URL for as long as this process lives."""
    for name, seconds in QUICK.items():
        setattr(ownership, name, seconds)
    with sole_writer(url):
        started.set()
        time.sleep(3600)
