"""Saving and loading checkpoints: what makes one complete, and errors on the way."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.utils import logging

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.cache.storage.staging import lock_file
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS
from logitcask.pipeline.models.adapters import has_adapter, load_adapter_weights
from logitcask.pipeline.runs.run_folder import SETTINGS_FILE, write_json
from logitcask.pipeline.train.resume.intact import WEIGHTS_FILE, damaged, instead_of

PATIENCE = 15.0  # seconds to wait for the lock of a run's folder


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Load a checkpoint's weights as ``from_pretrained`` does, which knows the names that each architecture stores.

    The Trainer's own loading leaves weights as the model was made if they are stored under other names, such as those
    of experts. Raises LogitcaskError if one is missing, of another shape, or not the model's.
    """
    if has_adapter(model):
        try:
            load_adapter_weights(checkpoint, model)
        except LogitcaskError as error:
            raise damaged(checkpoint / ADAPTER_WEIGHTS, str(error)) from error
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded, report = type(model).from_pretrained(
            checkpoint, dtype=model.dtype, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    wrong = [str(name) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for name in report[kind]]
    if wrong:
        raise damaged(checkpoint / WEIGHTS_FILE, f"does not fit the student: {len(wrong)} weights, such as {wrong[0]}")
    model.load_state_dict(loaded.state_dict())


@contextlib.contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Create the folder of a run and own it; remove it if it stays empty.

    Raises LogitcaskError if that fails, or if another run trains in the folder. The lock is on the folder itself; where
    the system or the disk has none, there is none.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogitcaskError(f"--output-dir {folder}: cannot be created: {error.strerror}: choose another") from error
    with contextlib.ExitStack() as stack:
        if made:
            stack.callback(_remove_if_empty, folder)
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, number)
            _lock(folder, number)
        yield


def _lock(folder: Path, number: int) -> None:
    """Lock an open folder. A killed run's processes that read batches hold its lock for some seconds more."""
    latest = time.monotonic() + PATIENCE
    while True:
        try:
            return lock_file(number)
        except BlockingIOError as error:
            if time.monotonic() > latest:
                raise LogitcaskError(
                    f"--output-dir {folder}: another run is training in it: wait for it or choose another"
                ) from error
        except LogitcaskError:  # the system has no locks
            return None
        time.sleep(0.2)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class CompleteCheckpoint(TrainerCallback):
    """Writes the resolved settings into each checkpoint, last: a checkpoint without them is not complete."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self._loading = True

    @contextlib.contextmanager
    def explain_load_errors(self, checkpoint: Path | None) -> Iterator[None]:
        """Turn what goes wrong while the Trainer loads a checkpoint, before its first step, into a LogitcaskError."""
        try:
            yield
        except LogitcaskError:
            raise
        except Exception as error:
            if checkpoint is None or not self._loading or out_of_memory(error):
                raise
            raise LogitcaskError(
                f"{checkpoint}: cannot be loaded: {first_line(error)}: {instead_of(checkpoint)}"
            ) from error

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note that the checkpoint is loaded."""
        self._loading = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint that was just saved, by all ranks."""
        wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to load
            write_json(folder / SETTINGS_FILE, self._record)
