"""Checkpoints of a run: which one to resume from, what makes one complete, and errors while saving one."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.cache.errors import LogitcaskError, differences
from logitcask.pipeline.runs.run_folder import LOG_FILE, SETTINGS_FILE, latest_checkpoint, write_json

# Settings that may change when a run is resumed: they affect what a step learns by rounding at most.
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "eval_steps"),
    *("num_workers", "use_wandb", "wandb_project", "wandb_run_name", "use_tensorboard", "use_trackio", "cache"),
    *("local_copies", "local_copies_gb", "min_fidelity", "device"),
    *("use_gradient_checkpointing", "use_mixed_precision", "mixed_precision_dtype"),
}
BATCH = ("batch_size", "gradient_accumulation_steps")  # only their product affects what a step learns


def choose_checkpoint(output: Path, resume_from: str | None, record: dict[str, Any]) -> str | None:
    """Return the checkpoint to resume from, None for a new run.

    A folder with nothing but a log, left by a run that saved no checkpoint, counts as empty. Raises LogitcaskError if
    the output folder is not empty, or the checkpoint is missing or belongs to another run.
    """
    if resume_from is None:
        if output.exists() and (not output.is_dir() or {file.name for file in output.iterdir()} - {LOG_FILE}):
            raise LogitcaskError(
                f"--output-dir {output}: not an empty folder: choose another, or resume with "
                "--resume-from-checkpoint latest"
            )
        return None
    folder = latest_checkpoint(output) if resume_from == "latest" else Path(resume_from)
    if folder is None:
        raise LogitcaskError(
            f"--resume-from-checkpoint latest: {output} holds no complete checkpoint: start without it"
        )
    if not (folder / SETTINGS_FILE).is_file():
        raise LogitcaskError(f"--resume-from-checkpoint {folder}: not a complete checkpoint of a run")
    try:
        saved = _learning_settings(json.loads((folder / SETTINGS_FILE).read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LogitcaskError(f"{folder / SETTINGS_FILE}: damaged: resume from an older checkpoint") from error
    changed = differences(saved, _learning_settings(record), "checkpoint")
    if changed:
        raise LogitcaskError(
            f"{folder}: is a checkpoint of another run: {'; '.join(changed)}; use the settings it started with"
        )
    return str(folder)


def _learning_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine what a run learns at each step."""
    others = {name: value for name, value in record.items() if name not in {*MAY_CHANGE, *BATCH}}
    return {**others, " * ".join(BATCH): record[BATCH[0]] * record[BATCH[1]]}


@contextlib.contextmanager
def explain_save_errors(output: Path) -> Iterator[None]:
    """Turn a failed write of weights or training state into a LogitcaskError that says how to resume."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # raised by torch.save
            raise
        checkpoint = latest_checkpoint(output)
        then = (
            f"resume with --resume-from-checkpoint {checkpoint}" if checkpoint else "remove the folder and start over"
        )
        raise LogitcaskError(
            f"{output}: cannot save: {error} ({shutil.disk_usage(output).free:,} bytes are free there): make room, "
            f"then {then}"
        ) from error


class CompleteCheckpoint(TrainerCallback):
    """Writes the resolved settings into each checkpoint, last: a checkpoint without them is not complete."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint that was just saved."""
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SETTINGS_FILE, self._record)
