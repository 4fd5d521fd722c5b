"""The machine a command runs on: its devices, its allocator, and what to do if its memory runs out."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

from logitcask.cache.errors import LogitcaskError, first_line

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h of glibc
OWN_MAPPING = 1 << 20  # bytes
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator if there is one. Raises LogitcaskError if unknown."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LogitcaskError(f"--device {name}: no such device here: use auto or cpu") from error
    return device


def free_large_blocks() -> None:
    """Have the allocator return each freed block of 1 MiB or more to the system at once: for stage 2.

    Otherwise glibc learns to cut blocks of up to 32 MiB out of one heap, where gradients and moments that stay end up
    between activations that go, and what is free there has the wrong size. Nothing is set with another C library.
    """
    _set_malloc_option(M_MMAP_THRESHOLD, OWN_MAPPING)


def share_one_heap() -> None:
    """Have all threads started after this share one heap: for stage 1.

    Otherwise each has its own, and over many shards each grows to what all need at times. Returning blocks at once
    would cost stage 1 more: it makes few results from many blocks of some MiB, and would wait for new pages each time.
    """
    _set_malloc_option(M_ARENA_MAX, 1)


def _set_malloc_option(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(option, value)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch raises a RuntimeError, on a CPU with words of its own."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn out-of-memory errors into a one-line LogitcaskError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise LogitcaskError(f"memory ran out ({first_line(error)}): {remedy}") from error
