"""The live table of stage 2: losses, speed, memory and time left, on a terminal while a student is trained."""

import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.pipeline.runs.run_folder import Line

COLUMNS = {  # of the table: what is logged, and its form
    "total": ("total_loss", ".4g"),
    "hard": ("hard_loss", ".4g"),
    "soft": ("soft_loss", ".4g"),
    "perplexity": ("perplexity", ",.1f"),
    "rate": ("learning_rate", ".2e"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "MB, peak": ("peak_memory_mb", ",.0f"),
}


class LiveTable(TrainerCallback):
    """The last log lines of training and of the held-out examples above a bar of the steps, on rank 0.

    As a context it ends the display, however the training ends. It shows nothing where the console is no terminal or
    is quiet. ``note`` gives a line to show below.
    """

    def __init__(self, console: Console, note: Callable[[], str] = str) -> None:
        self._shown = console.is_terminal and not console.quiet
        self._note = note
        self._training: Line = {}
        self._held_out: Line = {}
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            speed_estimate_period=math.inf,  # by the last 1,000 steps: one may take longer than any period
        )
        self._live = Live(console=console, get_renderable=self._render, redirect_stdout=sys.stdout.isatty())

    def replace_bar(self, trainer: Trainer) -> None:
        """Take the place of the Trainer's own bar and, but for a stdout that is kept, of the log lines it prints."""
        if self._shown or self._live.console.quiet:
            for own in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(own)
        if self._shown and not sys.stdout.isatty():
            trainer.add_callback(PrinterCallback)

    def show(self, line: Line) -> None:
        """Take a line of the run's log."""
        if "total_loss" in line:
            self._training = line
        else:
            self._held_out = line

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin the display, at the step that the run goes on from."""
        self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        if self._shown and state.is_world_process_zero:
            self._live.start(refresh=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar on."""
        self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the display; it stays on the screen."""
        self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def _render(self) -> Group:
        table = Table("", *COLUMNS, box=SIMPLE_HEAD)
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row("training", *_cells(self._training, ""))
        if self._held_out:
            table.add_row("held out", *_cells(self._held_out, "eval_"))
        return Group(table, self._bar, *filter(None, [self._note()]))


def _cells(line: Line, prefix: str) -> list[str]:
    values = ((line.get(prefix + name), form) for name, form in COLUMNS.values())
    return ["" if value is None else f"{value:{form}}" for value, form in values]
