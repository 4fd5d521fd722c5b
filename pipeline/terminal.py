"""What people see: the consoles of all commands, so that --quiet and NO_COLOR are heeded in one place."""

import os
from contextvars import ContextVar

from rich.console import Console

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
