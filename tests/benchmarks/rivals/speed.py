"""Capture and reading: processor time of the ways, which take turns."""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.benchmarks.rivals import ours
from tests.benchmarks.rivals.stock import BLOCK, Sizes, Stock, the_teacher
from tests.benchmarks.rivals.systems import Add, Read, System

BARE = "bare forward pass, full logits"


def turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds that each way says it took, by round, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seconds = way()
            if number:
                times[name].append(seconds)
    return times


def per_second(count: int, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return how many each way did per second, by its median, and the seconds."""
    return {name: {"per_second": count / median(found), "seconds": list(found)} for name, found in times.items()}


def read(folder: Path, systems: Iterable[System], sizes: Sizes) -> dict[str, Any]:
    """Return target positions per second that each system brings from its files to the tensors of its loss.

    Every round opens the files and reads all windows once, in a random order, as many per batch as a step takes. What
    ``datasets`` makes of Parquet files when it sees them first, before the rounds, is not counted.
    """
    order = np.random.default_rng(0).permutation(sizes.windows)[: sizes.windows // sizes.per_step * sizes.per_step]
    batches = np.sort(order.reshape(-1, sizes.per_step))

    def way(name: str, open_files: Callable[[Path], Read]) -> Callable[[], float]:
        def once() -> float:
            began = time.process_time()
            read = open_files(folder / name)
            for numbers in batches:
                read(numbers)
            return time.process_time() - began

        return once

    ways = {system.name: way(system.name, system.read) for system in systems if system.read}
    return per_second(order.size * (sizes.length - 1), turns(ways, sizes.rounds))


def capture(stock: Stock, systems: Iterable[System], sizes: Sizes) -> dict[str, Any]:
    """Return tokens per second from text to files: the same forward pass, then each system's own code.

    Ours is stage 1's engine and its writer. What a writer does before the first label, once per store, is not counted.
    axolotl has no capture; what writes its rows here is not its code.
    """
    ids = stock.ids[:BLOCK]
    model = the_teacher(stock.text.source)
    engine = load_teacher(stock.text.source, revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    mask = np.arange(ids.shape[1]) < ids.shape[1] - 1
    batch = [TokenizedExample(row, ids[row], mask, np.zeros(len(mask) - 1, dtype=bool)) for row in range(len(ids))]

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            computed: torch.Tensor = model(torch.from_numpy(ids), use_cache=False).logits
        return computed

    def bare() -> float:
        began = time.process_time()
        logits()
        return time.process_time() - began

    def theirs(write: Callable[[Path], AbstractContextManager[Add]]) -> float:
        with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
            add, began = stack.enter_context(write(Path(place))), time.process_time()
            for window, rows in zip(ids, logits(), strict=True):
                add(window, rows[:-1, : stock.text.vocabulary])
            stack.close()
            return time.process_time() - began

    def stage_1() -> float:
        with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
            writer, began = stack.enter_context(ours.writer(Path(place), stock.text)), time.process_time()
            for window, targets in zip(ids, engine.label(batch, ours.label_of(stock.text)).targets, strict=True):
                writer.add(window, mask, targets)
            stack.close()
            return time.process_time() - began

    ways: dict[str, Callable[[], float]] = {BARE: bare, ours.NAME: stage_1}
    for system in systems:
        if system.write and system.name.startswith("DistillKit"):
            ways[system.name] = partial(theirs, system.write)
    return per_second(ids.size, turns(ways, min(sizes.rounds, 3)))
