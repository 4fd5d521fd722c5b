"""Checkpoints of a run: which one to go on from, and what makes one complete."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.run_folder import LOG_FILE, SETTINGS_FILE
from logitcask.pipeline.settings.train import TrainSettings

# Knobs that may differ between a run and its resumption: they change what is learned at a step by rounding at most.
FREE = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "eval_steps"),
    *("num_workers", "use_wandb", "wandb_project", "wandb_run_name", "use_tensorboard", "use_trackio", "cache"),
    *("local_copies", "local_copies_gb", "min_fidelity", "device"),
    *("use_gradient_checkpointing", "use_mixed_precision", "mixed_precision_dtype"),
}
BATCH = ("batch_size", "gradient_accumulation_steps")  # their product alone is what a step learns from


def admit_output(settings: TrainSettings, record: dict[str, Any]) -> str | None:
    """The checkpoint to resume from, None for a new run.

    A log alone was left by a run that saved nothing, and counts as empty. Raises LogitcaskError where the output folder
    is not empty, or the checkpoint is missing or of another run.
    """
    wanted = settings.resume_from_checkpoint
    if wanted is None:
        output = settings.output_dir
        if output.exists() and (not output.is_dir() or {file.name for file in output.iterdir()} - {LOG_FILE}):
            raise LogitcaskError(
                f"--output-dir {settings.output_dir}: not an empty folder: choose another, or go on with "
                "--resume-from-checkpoint latest"
            )
        return None
    folder = latest_checkpoint(settings.output_dir) if wanted == "latest" else Path(wanted)
    if folder is None:
        raise LogitcaskError(
            f"--resume-from-checkpoint latest: {settings.output_dir} holds no complete checkpoint: start without it"
        )
    if not (folder / SETTINGS_FILE).is_file():
        raise LogitcaskError(f"--resume-from-checkpoint {folder}: no complete checkpoint of a run lies there")
    try:
        found = _learned(json.loads((folder / SETTINGS_FILE).read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LogitcaskError(f"{folder / SETTINGS_FILE}: damaged: resume from an older checkpoint") from error
    now = _learned(record)
    wrong = [
        f"{name}: checkpoint {found.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(found.keys() | now.keys())
        if found.get(name) != now.get(name)
    ]
    if wrong:
        raise LogitcaskError(
            f"{folder}: is a checkpoint of another run: {'; '.join(wrong)}; use the settings it began with"
        )
    return str(folder)


def _learned(record: dict[str, Any]) -> dict[str, Any]:
    """What decides what a run learns at a step."""
    kept = {name: value for name, value in record.items() if name not in {*FREE, *BATCH}}
    return {**kept, " * ".join(BATCH): record[BATCH[0]] * record[BATCH[1]]}


def latest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint of the most steps in a run's folder, None where there is none."""
    found = [folder for folder in output.glob("checkpoint-*") if (folder / SETTINGS_FILE).is_file()]
    return max(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


@contextlib.contextmanager
def saving(output: Path) -> Iterator[None]:
    """Raise LogitcaskError, which says how to go on, where the disk refuses a run's weights or state."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's writer of files
            raise
        found = latest_checkpoint(output)
        then = f"go on with --resume-from-checkpoint {found}" if found else "remove the folder and begin again"
        raise LogitcaskError(
            f"{output}: cannot save: {error} ({shutil.disk_usage(output).free:,} bytes are free there): make room, "
            f"then {then}"
        ) from error


class KeepSettings(TrainerCallback):
    """Writes the resolved settings into each checkpoint, last: a checkpoint without them is not complete."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint that was just saved."""
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SETTINGS_FILE, self._record)


def write_json(path: Path, value: Any) -> None:
    """A value as an indented JSON file, keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
