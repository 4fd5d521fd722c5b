"""Terminal output: consoles, notices and progress bars, so that all commands honour --quiet and NO_COLOR."""

import contextlib
import os
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
    """Show a progress bar over ``total`` units (None if unknown); yield the callback that advances it."""
    console = notices()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=console.quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, note="")

        def advance(units: int, note: str = "") -> None:
            progress.update(task, advance=units, note=note)

        yield advance


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
