"""Devices by name."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

from logitcask.cache.errors import LogitcaskError


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator if there is one. Raises LogitcaskError for none such."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LogitcaskError(f"--device {name}: no such device here: use auto or cpu") from error
    return device


M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h of glibc
OWN_MAPPING = 1 << 20  # bytes


def free_at_once() -> None:
    """Have each freed block of 1 MiB or more given back to the system: for stage 2.

    Else glibc learns to cut blocks of up to 32 MiB out of one heap, where gradients and moments that stay come to lie
    between activations that go, and what is free there is of the wrong size.
    """
    _set(M_MMAP_THRESHOLD, OWN_MAPPING)


def share_one_heap() -> None:
    """Have all threads that begin after this share one heap: for stage 1.

    Else each has its own, and over many shards each comes to hold what all need at times. To give blocks back at once
    would cost stage 1 more: it makes few results from many blocks of some MiB, and would wait for new pages each time.
    """
    _set(M_ARENA_MAX, 1)


def _set(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(option, value)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def ran_out(error: BaseException) -> str | None:
    """The first line of an error that is of memory run out, None for any other."""
    if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
        return None  # torch.OutOfMemoryError is a RuntimeError, and so is the refusal of its processor's allocator
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


@contextlib.contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Tell of memory that runs out within as LogitcaskError, with what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = ran_out(error)
        if told is None:
            raise
        raise LogitcaskError(f"memory ran out ({told}): {remedy}") from error
