"""Trackers that a run of stage 2 reports to besides its own log: Weights & Biases, TensorBoard, trackio."""

import atexit
import contextlib
import copy
import io
import os
import secrets
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import TrainerState

from logitcask.cache.errors import LogitcaskError, first_line
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


class _Wandb(WandbCallback):
    """Reports to Weights & Biases; a resumed run continues the run of the same id."""

    def __init__(self, project: str, run_id: str) -> None:
        super().__init__()
        self._project, self._run_id = os.environ.get("WANDB_PROJECT", project), run_id

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **named: Any) -> None:
        """Start or continue the run. Raises LogitcaskError if W&B refuses."""
        import wandb

        with _explain_wandb_errors():
            if state.is_world_process_zero and wandb.run is None:
                wandb.init(project=self._project, name=args.run_name, id=self._run_id, resume="allow")
            super().setup(args, state, model, **named)


def new_wandb_id() -> str:
    """Return the id of a new run in W&B: the user's in WANDB_RUN_ID, else a random one."""
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def require_wandb_login() -> None:
    """Raise LogitcaskError if W&B has no key, unless it is offline; on a terminal W&B asks for one."""
    import wandb

    with _explain_wandb_errors():
        if wandb.setup().settings.mode in ("online", "run", "shared"):
            wandb.login()


@contextlib.contextmanager
def _explain_wandb_errors() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        reason = first_line(error).rstrip(".")
        raise LogitcaskError(
            f"--use-wandb: {reason}: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline"
        ) from error


def trackers(
    output_dir: Path,
    project: str,
    *,
    wandb: bool,
    tensorboard: bool,
    trackio: bool,
    wandb_id: str | None = None,
    reports: bool = True,
) -> list[TrainerCallback]:
    """Return callbacks for the chosen trackers; ``reports``: whether this is the rank that reports.

    Raises LogitcaskError if the package of one is not installed, or W&B has no key.
    """
    known: dict[str, tuple[bool, Callable[[], TrainerCallback]]] = {
        "wandb": (wandb, lambda: _Wandb(project, wandb_id or new_wandb_id())),
        "tensorboard": (tensorboard, lambda: _tensorboard(output_dir)),
        "trackio": (trackio, _Trackio),
    }
    chosen = {name: make for name, (on, make) in known.items() if on}
    for name in chosen:
        if find_spec(name) is None:
            raise LogitcaskError(f"--use-{name} needs the package {name}: pip install 'logitcask[{name}]'")
    if wandb and reports:
        require_wandb_login()
    return [make() for make in chosen.values()]


def _tensorboard(output_dir: Path) -> TrainerCallback:
    """Write all events to one folder: by default those before and after training go to another."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(output_dir / "tensorboard")
    return callback
