"""A copy that is killed at a chosen write; apart from the tests, so that a new process starts quickly."""

import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from zarr.storage import LocalStore

from cache import remote
from cache.copy import copy_cache

Write = Callable[..., Coroutine[Any, Any, None]]


def copy_and_die(source: str, destination: str, writes: int) -> None:
    """Copy until ``writes`` objects are written, then SIGKILL."""
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
