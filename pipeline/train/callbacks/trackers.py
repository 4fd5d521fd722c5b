"""Trackers that a run of stage 2 reports to besides its own log: Weights & Biases, TensorBoard, trackio."""

import atexit
import contextlib
import copy
import io
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import TrainerState

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import say


class _Trackio(TrackioCallback):
    """Reports to trackio, with one notice instead of trackio's output on stdout; the run ends with the process."""

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **named: Any) -> None:
        """Start the run or continue that of the same name, by default the output folder's: a resumed run continues."""
        args = copy.copy(args)
        args.run_name = args.run_name or args.output_dir
        with contextlib.redirect_stdout(io.StringIO()):
            super().setup(args, state, model, **named)
        if state.is_world_process_zero:
            atexit.register(_finish_trackio)
            say(f"trackio: run {args.run_name}; see it with trackio show --project {args.project}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Keep the run open for the last evaluation."""


def _finish_trackio() -> None:
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):
        trackio.finish()


def trackers(output_dir: Path, project: str, *, wandb: bool, tensorboard: bool, trackio: bool) -> list[TrainerCallback]:
    """Return callbacks for the chosen trackers. Raises LogitcaskError if the package of one is not installed."""
    known: dict[str, tuple[bool, Callable[[], TrainerCallback]]] = {
        "wandb": (wandb, lambda: _wandb(project)),
        "tensorboard": (tensorboard, lambda: _tensorboard(output_dir)),
        "trackio": (trackio, _Trackio),
    }
    chosen = {name: make for name, (on, make) in known.items() if on}
    for name in chosen:
        if find_spec(name) is None:
            raise LogitcaskError(f"--use-{name} needs the package {name}: pip install 'logitcask[{name}]'")
    return [make() for make in chosen.values()]


def _wandb(project: str) -> TrainerCallback:
    os.environ.setdefault("WANDB_PROJECT", project)
    return WandbCallback()


def _tensorboard(output_dir: Path) -> TrainerCallback:
    """Write all events to one folder: by default those before and after training go to another."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(output_dir / "tensorboard")
    return callback
