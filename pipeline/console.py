"""What people see: the consoles of all commands, so that --quiet and NO_COLOR are heeded in one place."""

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
PLAIN_WIDTH = 120  # columns where there is no terminal


def results() -> Console:
    """Of what a command is for: on stdout."""
    return _console(stderr=False)


def notices() -> Console:
    """Of progress and notices: on stderr, and silent with --quiet. Errors do not go through it."""
    return _console(stderr=True)


def say(text: str) -> None:
    """A notice of one line."""
    notices().print(text, soft_wrap=True, highlight=False, markup=False)


def _console(*, stderr: bool) -> Console:
    plain = bool(os.environ.get("NO_COLOR"))  # rich itself would go on to print bold
    console = Console(stderr=stderr, quiet=stderr and QUIET.get(), color_system=None if plain else "auto")
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class _Rate(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The task's speed."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else "", style="progress.data.speed")


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, units: int, note: str = "") -> None:
        """By so many units, with a word beside the bar."""


@contextlib.contextmanager
def track(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar over ``total`` units; call what it gives with the units just done, and a note where there is one."""
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
