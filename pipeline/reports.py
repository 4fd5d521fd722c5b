"""Where a run of stage 2 is reported to, beside its own log: Weights & Biases, TensorBoard, trackio."""

import contextlib
import io
import os
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from cache.errors import LogitcaskError
from pipeline.settings import TrainSettings
from pipeline.terminal import say


class _Trackio(TrackioCallback):
    """Trackio's own words, in colours and on stdout, as one notice."""

    def setup(self, args: Any, state: Any, model: Any, **named: Any) -> None:
        """Begin or go on with the run."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().setup(args, state, model, **named)
        say(f"trackio: run {args.run_name}; see it with trackio show --project {args.project}")


def reporters(settings: TrainSettings) -> list[TrainerCallback]:
    """Callbacks for the reports asked for. Raises LogitcaskError where a package for one is not installed."""
    asked = {"wandb": settings.use_wandb, "tensorboard": settings.use_tensorboard, "trackio": settings.use_trackio}
    names = [name for name, on in asked.items() if on]
    for name in names:
        if find_spec(name) is None:
            raise LogitcaskError(f"--use-{name} needs the package {name}: pip install 'logitcask[{name}]'")
    made = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": lambda _: _Trackio()}
    return [made[name](settings) for name in names]


def _wandb(settings: TrainSettings) -> TrainerCallback:
    os.environ.setdefault("WANDB_PROJECT", settings.wandb_project)
    return WandbCallback()


def _tensorboard(settings: TrainSettings) -> TrainerCallback:
    """All events in one folder: the Trainer's choice leaves those before and after training elsewhere."""
    found = TensorBoardCallback()
    found.logging_dir = str(settings.output_dir / "tensorboard")
    return found
