"""What stage 2 shows while a student trains: a live table on a terminal, else a line for each line of the log."""

import math
import sys
import time
from collections import deque
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

from logitcask.pipeline.console import print_line, size, time_left
from logitcask.pipeline.runs.run_folder import Line

COLUMNS = {  # heading: logged quantity, format
    "step": ("step", ",.0f"),
    "total": ("total_loss", ".4g"),
    "hard": ("hard_loss", ".4g"),
    "soft": ("soft_loss", ".4g"),
    "perplexity": ("perplexity", ",.4g"),
    "rate": ("learning_rate", ".2e"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "MB, peak": ("peak_memory_mb", ",.0f"),
}
ROWS_OF_TRAINING, ROWS_OF_HELD_OUT = 6, 3


class LiveTable(TrainerCallback):
    """Shows the last log lines of training and evaluation above a progress bar of steps, on rank 0.

    As a context manager it ends the display, however the training ends. Off a terminal each line is printed instead; a
    quiet console shows nothing. ``note`` returns a line to show below the bar.
    """

    def __init__(self, console: Console, steps: int, note: Callable[[], str] = str) -> None:
        self._console, self._steps, self._note = console, steps, note
        self._shown = console.is_terminal and not console.quiet
        self._training: deque[Line] = deque(maxlen=ROWS_OF_TRAINING)
        self._held_out: deque[Line] = deque(maxlen=ROWS_OF_HELD_OUT)
        self._begin, self._started = 0, time.monotonic()
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
        """Remove the Trainer's own bar and its printed log lines."""
        for own in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(own)

    def show(self, line: Line) -> None:
        """Show a line of the run's log."""
        (self._training if "total_loss" in line else self._held_out).append(line)
        if not self._shown:
            step = int(line.get("step") or 0)
            seconds = (time.monotonic() - self._started) / max(1, step - self._begin) * (self._steps - step)
            print_line(self._console, log_line(line, self._steps, seconds))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the display at the step from which the run starts or resumes."""
        self._begin, self._started = state.global_step, time.monotonic()
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
        for line in self._training:
            table.add_row("training", *_cells(line, ""))
        for line in self._held_out:
            table.add_row("held out", *_cells(line, "eval_"))
        goal = self._held_out[-1].get("eval_teacher_perplexity") if self._held_out else None
        if goal is not None:
            table.add_row("the teacher", *("" if name != "perplexity" else f"{goal:,.4g}" for name in COLUMNS))
        return Group(table, self._bar, *filter(None, [self._note()]))


def log_line(line: Line, steps: int, seconds_left: float) -> str:
    """Return a line of the run's log as text: the time of day, the step, and what was logged."""
    prefix = "" if "total_loss" in line else "eval_"
    parts = [time.strftime("%H:%M:%S"), f"step {line.get('step') or 0:,.0f}/{steps:,}"]
    if prefix:
        parts.append("held out")
    else:
        parts.append(f"epoch {line.get('epoch') or 0:.2f}")
    total, hard, soft = (_number(line.get(f"{prefix}{name}_loss"), ".4g") for name in ("total", "hard", "soft"))
    parts.append(f"loss {total}" + (f" (hard {hard}, soft {soft})" if line.get(f"{prefix}soft_loss") else ""))
    parts.append(f"ppl {_number(line.get(f'{prefix}perplexity'), ',.4g')}")
    if prefix:
        teacher = line.get("eval_teacher_perplexity")
        return "  ".join([*parts, *([] if teacher is None else [f"teacher's ppl {teacher:,.4g}"])])
    for name, form in (("alpha", "alpha {:.3g}"), ("temperature", "T={:g}"), ("learning_rate", "lr {:.2g}")):
        if (value := line.get(name)) is not None:
            parts.append(form.format(value))
    parts.append(f"{line.get('tokens_per_second') or 0:,.0f} tok/s")
    if (memory := line.get("peak_memory_mb")) is not None:
        parts.append(size(memory * 1e6))
    return "  ".join([*parts, *([time_left(seconds_left)] if seconds_left > 0 else [])])


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else f"{value:{form}}"


def _cells(line: Line, prefix: str) -> list[str]:
    values = ((line.get(name if name == "step" else prefix + name), form) for name, form in COLUMNS.values())
    return ["" if value is None else f"{value:{form}}" for value, form in values]
