"""The live table of stage 2: losses, speed, memory and time left, on a terminal while a student trains."""

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

COLUMNS = {  # heading: logged quantity, format
    "total": ("total_loss", ".4g"),
    "hard": ("hard_loss", ".4g"),
    "soft": ("soft_loss", ".4g"),
    "perplexity": ("perplexity", ",.1f"),
    "rate": ("learning_rate", ".2e"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "MB, peak": ("peak_memory_mb", ",.0f"),
}


class LiveTable(TrainerCallback):
    """Shows the latest log lines of training and evaluation above a progress bar of steps, on rank 0.

    As a context manager it ends the display, however the training ends. It shows nothing if the console is quiet or not
    a terminal. ``note`` returns a line to show below the bar.
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
            speed_estimate_period=math.inf,  # estimate from the last 1,000 steps: a single one may exceed any period
        )
        self._live = Live(console=console, get_renderable=self._render, redirect_stdout=sys.stdout.isatty())

    def replace_bar(self, trainer: Trainer) -> None:
        """Remove the Trainer's own bar and its printed log lines; the lines stay if stdout goes to a file or a pipe."""
        if self._shown or self._live.console.quiet:
            for own in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(own)
        if self._shown and not sys.stdout.isatty():
            trainer.add_callback(PrinterCallback)

    def show(self, line: Line) -> None:
        """Show a line of the run's log."""
        if "total_loss" in line:
            self._training = line
        else:
            self._held_out = line

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the display at the step from which the run starts or resumes."""
        self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        if self._shown and state.is_world_process_zero:
            self._live.start(refresh=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the bar."""
        self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop updating; the table stays on the screen."""
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
