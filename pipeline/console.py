"""Terminal output: consoles, notices and progress bars, so that all commands honour --quiet and NO_COLOR."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
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
FIRST_SECONDS = 5.0  # before the first one; the time doubles until it is LINE_SECONDS
LABEL_WIDTH = 10  # columns of the label that a line starts with


def results() -> Console:
    """Return the console for a command's results: stdout."""
    return _console(stderr=False)


def notices() -> Console:
    """Return the console for progress and notices: stderr, silenced by --quiet. Errors do not go through it."""
    return _console(stderr=True)


def hide_bars() -> None:
    """Keep transformers' own bars, of loading and saving weights, off the terminal; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def say(text: str, label: str = "note") -> None:
    """Print a one-line notice, aligned with the others after its label."""
    print_line(notices(), aligned(label, text))


def announce(text: str, label: str) -> None:
    """Print a command's one-line result, aligned with the notices."""
    print_line(results(), aligned(label, text))


def aligned(label: str, text: str) -> str:
    """Return a line such as ``teacher   Qwen/Qwen3-8B, bfloat16``."""
    return f"{label:<{LABEL_WIDTH}}{text}"


def amount(count: float) -> str:
    """Return a count as people read it: ``49,000``, from a million on ``21.4M``, ``1.2B``."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}" if count < 1e3 * unit else f"{count / unit:,.0f}{letter}"
    return f"{count:,.0f}"


def counted(count: int, word: str) -> str:
    """Return a count with its word, in the plural unless it is one: ``1 shard``, ``196 shards``."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """Return a number of bytes with its decimal unit: ``831 MB``."""
    power = min(4, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours: ``48 s``, ``15.2 min``, ``6.7 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def time_left(seconds: float) -> str:
    """Return what is left of a run, in whole minutes below 90: ``14 min left``."""
    return f"{seconds / 3600:,.1f} h left" if seconds >= 5400 else f"{math.ceil(seconds / 60)} min left"


class Advance(Protocol):
    """Callback that advances a progress bar."""

    def __call__(self, units: int, note: str = "") -> None:
        """Advance by ``units`` and show ``note`` beside the bar."""


@contextlib.contextmanager
def track(what: str, total: int | None, unit: str, *, place: Callable[[int], str] | None = None) -> Iterator[Advance]:
    """Show a progress bar over ``total`` units (None if unknown); yield the callback that advances it.

    ``place`` returns what to show for the units that are done, in place of their number. Off a terminal a line is
    printed instead, after 5, 15, 35, 75 and 135 seconds, then every minute; with ``place`` also at the end.
    """
    console = notices()
    if not console.is_terminal:
        lines = _Lines(console, what, total, unit, place)
        yield lines
        if place is not None:
            lines.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if place is None else TextColumn("{task.fields[place]}"),
        _Rate(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        shown = place or str
        task = progress.add_task(what, total=total, note="", place=shown(0))

        def advance(units: int, note: str = "") -> None:
            progress.update(task, advance=units, note=note)
            progress.update(task, place=shown(int(progress.tasks[0].completed)))

        yield advance


class _Lines:
    """Prints progress as lines such as ``12:04:31  labelling 48,210/786,400  6.1%  23,900 tokens/s  14 min left``."""

    def __init__(
        self, console: Console, what: str, total: int | None, unit: str, place: Callable[[int], str] | None = None
    ) -> None:
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._place = place or self._counted
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._pause, self._note = min(FIRST_SECONDS, LINE_SECONDS), ""
        self._shown = -1  # the units at the last line
        self._lock = threading.Lock()  # HumanEval's samples and API requests advance from several threads

    def __call__(self, units: int, note: str = "") -> None:
        """Advance by ``units``, and print a line if one is due."""
        with self._lock:
            self._done, self._note = self._done + units, note
            now = time.monotonic()
            if now - self._printed < self._pause:
                return
            self._pause = min(2 * self._pause, LINE_SECONDS)
            self._print(now)

    def finish(self) -> None:
        """Print a last line, unless there was nothing to do, or the last one is as new."""
        if self._done and self._done != self._shown:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._printed, self._shown = now, self._done
        place, seconds = self._place(self._done), now - self._started
        line = progress_line(place, self._done, self._total, self._unit, seconds, self._note)
        print_line(self._console, line)

    def _counted(self, done: int) -> str:
        return f"{self._what} {done:,}" + (f"/{self._total:,}" if self._total else "")


def progress_line(place: str, done: int, total: int | None, unit: str, seconds: float, note: str = "") -> str:
    """Return a line of progress: the time of day, what is done, units per second since the start, and the time left."""
    rate = done / max(seconds, 1e-9)
    parts = [time.strftime("%H:%M:%S"), place]
    if total:
        parts.append(f"{done / total:.1%}")
    parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
    if total and rate and done < total:
        parts.append(time_left((total - done) / rate))
    return "  ".join([*parts, *filter(None, [note])])


def print_line(console: Console, line: str) -> None:
    """Print a line as it is, without wrapping it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


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
