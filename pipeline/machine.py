"""The machine a command runs on: devices, the memory allocator, and out-of-memory errors."""

import contextlib
import ctypes
import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from logitcask.cache.errors import LogitcaskError, first_line

M_ARENA_MAX = -8  # malloc.h of glibc
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` picks an accelerator if there is one.

    Raises LogitcaskError if the device does not exist.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LogitcaskError(f"--device {name}: no such device here: use auto or cpu") from error
    return device


def device_name(device: torch.device) -> str:
    """Return what a device is: the product's name of a GPU, otherwise its kind, such as cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def why_slow(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a notice if a dtype makes this CPU slow, None if it does not, or if nothing is known of it.

    Where x86 has no AVX-512, products in 16 bits take far longer than in float32.
    """
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has none
    if device.type != "cpu" or dtype.itemsize > 2 or known.get("avx512_bw", known.get("architecture") != "x86_64"):
        return None
    return f"this CPU has no instructions for {str(dtype).removeprefix('torch.')} and takes far longer than in float32"


def free_memory(device: torch.device, group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that are free on a device, None if it is not known; on a CPU, in this container if it is less.

    ``group``: where Linux shows the limit of a container.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit reads as max
        return free
    return min(free, max(0, limit - used))


def worker_processes(count: int) -> BaseContext | None:
    """Return how a DataLoader starts its workers, none if it has none.

    They are not forks of this process: zarr's threads would not survive that. On Linux they are forks of one that has
    done nothing but their imports, so that these take time and memory once, however many workers there are.
    """
    if not count:
        return None
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["logitcask.pipeline.batches.loader"])
    return context


def prepare_worker(_: int) -> None:
    """Make a DataLoader worker ignore SIGINT and SIGHUP and end with the process that it works for, however that ends.

    Ctrl-C in a terminal, and its end, reach it too, but the step still needs it.
    """
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def share_one_heap() -> None:
    """Make all threads started from now on share one heap (for stage 1).

    By default each thread has its own, and over many shards every heap grows to the peak that any thread ever needs.
    Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out; torch raises RuntimeErrors, worded differently on a CPU."""
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in OUT_OF_MEMORY)


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn out-of-memory errors into a one-line LogitcaskError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise LogitcaskError(f"memory ran out ({first_line(error)}): {remedy}") from error
