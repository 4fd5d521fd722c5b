"""metrics.jsonl: one line of JSON for each log line and evaluation of a run of stage 2."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.pipeline.runs.run_folder import LOG_FILE, Line, read_log


class MetricsLog(TrainerCallback):
    """Writes ``metrics.jsonl`` into the run's folder, on rank 0: what the Trainer logs of training and evaluations.

    Each line has ``step``, ``epoch``, ``seconds`` (of the run; what a resumed run had done before counts) and
    ``peak_memory_mb`` (of 10^6 bytes, since the process began: of the accelerator where there is one, else of the
    process); those of training ``tokens`` since the line before and ``tokens_per_second`` without evaluations and
    saves. A resumed run drops the lines past its checkpoint; each checkpoint's step has a line, so none is counted
    twice or lost. ``tell`` gets each line, too.
    """

    def __init__(self, output: Path, tell: Callable[[Line], None] = lambda line: None) -> None:
        self._output, self._tell = output, tell
        self._started = self._last = time.monotonic()
        self._training = 0.0  # seconds of training since the last line of training
        self._begun = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines past the checkpoint, and start the clock."""
        self._begin(state)
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step's time; have a line where a checkpoint is about to be saved, as at the end."""
        self._tick()
        if control.should_save:
            control.should_log = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the evaluation out of the time of training."""
        self._last = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the saving out of the time of training."""
        self._last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a line; the Trainer's last one, of the whole run, is none of these."""
        if logs is None or not {"total_loss", "eval_total_loss"} & logs.keys() or not state.is_world_process_zero:
            return
        self._begin(state)
        line: Line = {**logs, "step": state.global_step, "epoch": state.epoch or 0.0}
        line["peak_memory_mb"] = peak_memory() / 1e6
        line["seconds"] = time.monotonic() - self._started
        if "tokens" in logs:
            self._tick()
            line["tokens_per_second"] = logs["tokens"] / max(self._training, 1e-9)
            self._training = 0.0
        with (self._output / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(_written(line))
        self._tell(line)

    def _begin(self, state: TrainerState) -> None:
        """Once: keep the lines up to the step that the run goes on from."""
        if self._begun or not state.is_world_process_zero:
            return
        self._begun = True
        file = self._output / LOG_FILE
        lines = read_log(self._output) if state.global_step and file.exists() else []
        kept = [line for line in lines if (line["step"] or 0) <= state.global_step]
        if kept:
            self._started -= kept[-1].get("seconds") or 0.0
        self._output.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{LOG_FILE}.new") if kept else file
        new.write_text("".join(map(_written, kept)), encoding="utf-8")
        os.replace(new, file)

    def _tick(self) -> None:
        now = time.monotonic()
        self._training += now - self._last
        self._last = now


def _written(line: Line) -> str:
    """A line of strict JSON: null for what is not finite."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def peak_memory() -> int:
    """Bytes at most since the process began: allocated on the accelerator, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
