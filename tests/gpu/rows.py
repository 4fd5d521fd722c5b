"""What a part of the check is given, what it yields, and how it takes times and memory."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from logitcask.cache.errors import first_line

Figure = float | str | None  # None: not known on this device
Way = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Where the check runs: ``tiny`` makes everything small enough for a test, ``folder`` is for what a part writes."""

    device: torch.device
    tiny: bool
    folder: Path


@dataclass(frozen=True)
class Row:
    """A line of the table. ``passed`` is None for what is only measured."""

    name: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    passed: bool | None = None


@dataclass(frozen=True)
class Cost:
    """Median seconds of a call and the MB (10^6 bytes) of device memory that it adds at its peak."""

    seconds: float | None  # None if it runs out of memory
    mb: float | None  # None if the device does not count it

    def figures(self, name: str) -> dict[str, Figure]:
        """Return the two as figures of a row."""
        if self.seconds is None:
            return {f"{name}, s": "out of memory", f"{name}, MB": None}
        return {f"{name}, s": self.seconds, f"{name}, MB": self.mb}


def free(device: torch.device) -> None:
    """Return to the device what nobody refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def costs(ways: Mapping[str, Way], device: torch.device, rounds: int) -> dict[str, Cost]:
    """Return what each way costs: peaks of a first call, medians of ``rounds`` more, in which the ways take turns."""
    peaks, alive = {name: _peak(way, device) for name, way in ways.items()}, dict(ways)
    for name in [name for name, (ran, _) in peaks.items() if not ran]:
        del alive[name]
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name, way in alive.items():
            wait(device)
            began = time.perf_counter()
            way()
            wait(device)
            times[name].append(time.perf_counter() - began)
    return {name: Cost(median(times[name]) if name in times else None, peaks[name][1]) for name in ways}


def _peak(way: Way, device: torch.device) -> tuple[bool, float | None]:
    """Return whether a call has enough memory, and the MB that it adds at its peak."""
    free(device)
    counts = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if counts else 0
    if counts:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        way()  # also warms up
        wait(device)
    except torch.OutOfMemoryError:
        free(device)
        return False, None
    return True, (torch.cuda.max_memory_allocated(device) - before) / 1e6 if counts else None


def ratio(one: Cost, other: Cost) -> Figure:
    """Return how many times the seconds of the other a way takes, None if one of the two does not fit."""
    return None if one.seconds is None or other.seconds is None else one.seconds / other.seconds


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Return the norm of the difference over that of the true values, computed on the CPU in float64; NaN stays NaN."""
    exact = true.detach().cpu().double()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm().clamp_min(1e-300))


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
