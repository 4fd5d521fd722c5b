"""Terminal output: consoles, notices and progress bars, so that all commands honour --quiet and NO_COLOR."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

QUIET = ContextVar("QUIET", default=False)  # set by --quiet
PLAIN_WIDTH = 120  # columns when the output is not a terminal
LINE_SECONDS = 60.0  # between lines of progress when it is not a terminal


def results() -> Console:
    """Return the console for a command's results: stdout."""
    return _console(stderr=False)


def notices() -> Console:
    """Return the console for progress and notices: stderr, silenced by --quiet. Errors do not go through it."""
    return _console(stderr=True)


def say(text: str) -> None:
    """Print a one-line notice."""
    notices().print(text, soft_wrap=True, highlight=False, markup=False)


class Advance(Protocol):
    """Callback that advances a progress bar."""

    def __call__(self, units: int, note: str = "") -> None:
        """Advance by ``units`` and show ``note`` beside the bar."""


@contextlib.contextmanager
def track(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show a progress bar over ``total`` units (None if unknown); yield the callback that advances it.

    Off a terminal a line is printed every ``LINE_SECONDS`` instead, as soon as there is progress.
    """
    console = notices()
    if not console.is_terminal:
        yield _Lines(console, what, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        task = progress.add_task(what, total=total, note="")

        def advance(units: int, note: str = "") -> None:
            progress.update(task, advance=units, note=note)

        yield advance


class _Lines:
    """Prints progress as lines such as ``12:04:31  labelling 48,210/786,400  6.1%  23,900 tokens/s  14 min left``."""

    def __init__(self, console: Console, what: str, total: int | None, unit: str) -> None:
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._lock = threading.Lock()  # HumanEval's samples and API requests advance from several threads

    def __call__(self, units: int, note: str = "") -> None:
        """Advance by ``units``, and print a line if one is due."""
        with self._lock:
            self._done += units
            now = time.monotonic()
            if now - self._printed < LINE_SECONDS:
                return
            self._printed = now
            line = progress_line(self._what, self._done, self._total, self._unit, now - self._started, note)
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def progress_line(what: str, done: int, total: int | None, unit: str, seconds: float, note: str = "") -> str:
    """Return a line of progress: the time of day, what is done, units per second since the start, and the time left."""
    rate = done / max(seconds, 1e-9)
    parts = [time.strftime("%H:%M:%S"), f"{what} {done:,}" + (f"/{total:,}" if total else "")]
    if total:
        parts.append(f"{done / total:.1%}")
    parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
    if total and rate:
        left = (total - done) / rate
        parts.append(f"{left / 3600:.1f} h left" if left >= 5400 else f"{math.ceil(left / 60)} min left")
    return "  ".join([*parts, *filter(None, [note])])


def _console(*, stderr: bool) -> Console:
    plain = bool(os.environ.get("NO_COLOR"))  # rich alone would still print bold text
    console = Console(stderr=stderr, quiet=stderr and QUIET.get(), color_system=None if plain else "auto")
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class _Rate(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the task's speed as text, empty until it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else "", style="progress.data.speed")
