"""How glibc's malloc is set for each stage, so that memory stays what is in use: elsewhere nothing is set."""

import ctypes
import platform

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
