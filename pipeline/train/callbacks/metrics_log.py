"""metrics.jsonl: one JSON object per log line and per evaluation of a run of stage 2."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.cache.storage.ownership import watch_folder
from logitcask.pipeline.runs.run_folder import LOG_FILE, Line, explain_save_errors, read_log


class MetricsLog(TrainerCallback):
    """Writes what the Trainer logs of training and evaluations to ``metrics.jsonl`` in the run's folder, on rank 0.

    Each line has ``step``, ``epoch``, ``seconds`` (since the run started, including the time before it was resumed)
    and ``peak_memory_mb`` (10^6 bytes, since the process started: of the CUDA device if there is one, else of the
    process). Lines of training also have ``tokens`` since the previous such line, and ``tokens_per_second`` excluding
    evaluations and saves. A resumed run drops the lines past its checkpoint; each checkpoint's step has a line, so no
    tokens are lost or counted twice. ``report`` receives each line, too. Raises LogitcaskError if a line cannot be
    written, or if the folder was moved, removed or unmounted: what follows would begin another there.
    """

    def __init__(self, output: Path, report: Callable[[Line], None] = lambda line: None) -> None:
        self._output, self._report = output, report
        self._started = self._last = time.monotonic()
        self._training = 0.0  # seconds of training since the last training line
        self._opened = False
        self._require_folder: Callable[[], None] = lambda: None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines past the checkpoint, and start the clock."""
        self._open_log(state)
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step's time; request a log line if a checkpoint is about to be saved, as after the last step."""
        self._tick()
        if control.should_save:
            control.should_log = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Exclude the evaluation from the training time."""
        self._last = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Exclude the save from the training time."""
        self._last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a line of training or of an evaluation; the Trainer's final summary of the run is skipped."""
        if logs is None or not {"total_loss", "eval_total_loss"} & logs.keys() or not state.is_world_process_zero:
            return
        self._open_log(state)
        line: Line = {**logs, "step": state.global_step, "epoch": state.epoch or 0.0}
        memory = peak_memory()
        line["peak_memory_mb"] = None if memory is None else memory / 1e6
        line["seconds"] = time.monotonic() - self._started
        if "tokens" in logs:
            self._tick()
            line["tokens_per_second"] = logs["tokens"] / max(self._training, 1e-9)
            self._training = 0.0
        with explain_save_errors(self._output):
            self._require_folder()  # also before each checkpoint, which would be saved into a bare folder
            with (self._output / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(_to_json(line))
        self._report(line)

    def _open_log(self, state: TrainerState) -> None:
        """Create the log at the first call; a resumed run keeps the lines up to its checkpoint's step."""
        if self._opened or not state.is_world_process_zero:
            return
        self._opened = True
        file = self._output / LOG_FILE
        lines = read_log(self._output) if state.global_step and file.exists() else []
        earlier = [line for line in lines if (line["step"] or 0) <= state.global_step]
        if earlier:
            self._started -= earlier[-1].get("seconds") or 0.0
        self._output.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{LOG_FILE}.new") if earlier else file
        new.write_text("".join(map(_to_json, earlier)), encoding="utf-8")
        os.replace(new, file)
        self._require_folder = watch_folder(self._output)

    def _tick(self) -> None:
        now = time.monotonic()
        self._training += now - self._last
        self._last = now


def _to_json(line: Line) -> str:
    """Return a line of strict JSON, with null for non-finite numbers."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def peak_memory() -> int | None:
    """Return the peak memory since the process started, in bytes: allocated by CUDA, or resident without CUDA.

    None if the system does not report it, as Windows, which has no module ``resource``.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins with what the process that started this one had
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else None
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
