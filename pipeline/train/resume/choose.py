"""The checkpoint that a run is resumed from: complete, undamaged and of the same run, or none."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.cache.errors import LogitcaskError, differences
from logitcask.pipeline.runs.run_folder import ENDS_FILE, FINAL, LOG_FILE, SETTINGS_FILE, latest_checkpoint
from logitcask.pipeline.train.resume.identity import LENGTH, learning_settings
from logitcask.pipeline.train.resume.intact import (
    STATE_FILE,
    damaged,
    instead_of,
    require_intact,
    require_same_sharding,
    rng_file,
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are complete and belong to this run."""

    folder: Path
    step: int  # optimizer steps done
    record: dict[str, Any]  # the settings stored with it, ``world_size`` included
    steps: int = 0  # of its whole run
    extended: bool = False  # whether this run has another length than that


def choose_checkpoint(
    output: Path, resume_from: str | None, record: dict[str, Any], *, fsdp: bool = False, extend: bool = False
) -> Checkpoint | None:
    """Return the checkpoint to resume from, None for a new run.

    ``record`` holds the settings of this run with its ``world_size``; ``fsdp``: whether it is sharded; ``extend``:
    whether its length may be another than the checkpoint's. A folder with nothing but a log, left by a run that saved
    no checkpoint, counts as empty. Raises LogitcaskError if the output folder is not empty, or the checkpoint is
    missing, damaged or of another run.
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
    _require_checkpoint(folder)
    saved = _read_record(folder)
    extended = _require_same_run(folder, saved, record, extend=extend)
    require_same_sharding(folder, fsdp)
    step, steps = require_intact(folder, saved, record, fsdp)
    return Checkpoint(folder, step, saved, steps, extended)


def _require_same_run(folder: Path, saved: dict[str, Any], record: dict[str, Any], *, extend: bool) -> bool:
    """Return whether the two runs have different lengths. Raises LogitcaskError if one must not continue the other."""
    try:
        before, now = learning_settings(saved), learning_settings(record)
    except (TypeError, KeyError) as error:
        raise damaged(folder / SETTINGS_FILE) from error
    changed = differences(before, now, "checkpoint")
    length = [name for name in LENGTH if before.get(name) != now.get(name)]
    others = len(changed) > len(length)
    if others or (length and not extend):
        or_else = ": --extend allows other --max-steps and --epochs alone" if extend else ""
        or_else = or_else if others else ", or train it for more steps with --extend"
        raise LogitcaskError(
            f"{folder}: is a checkpoint of another run: {'; '.join(changed)}; use the settings it started with{or_else}"
        )
    return bool(length)


def _require_checkpoint(folder: Path) -> None:
    """Raise LogitcaskError, with what to give instead, if a folder is not a complete checkpoint."""
    option = f"--resume-from-checkpoint {folder}"
    latest = latest_checkpoint(folder)
    if latest is not None:
        raise LogitcaskError(f"{option}: is the folder of a run: give one of its checkpoints, such as {latest}")
    if folder.name == FINAL and (folder / SETTINGS_FILE).is_file() and not (folder / STATE_FILE).exists():
        latest = latest_checkpoint(folder.parent)
        give = f"give a checkpoint, such as {latest}" if latest else "the run's checkpoints are gone"
        raise LogitcaskError(
            f"{option}: is a finished student without the state of its optimizer: {give}; to train it further, start "
            f"from --student-model {folder} in another --output-dir"
        )
    if not (folder / SETTINGS_FILE).is_file():
        raise LogitcaskError(f"{option}: not a complete checkpoint of a run: {instead_of(folder)}")


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the settings stored with a checkpoint; before ``world_size`` was stored, its random states count ranks."""
    file = folder / SETTINGS_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(file) from error
    if not isinstance(record, dict):
        raise damaged(file)
    if "world_size" not in record:
        ranks = 1 if (folder / rng_file(0, 1)).exists() else len(list(folder.glob("rng_state_[0-9]*.pth")))
        if not ranks:
            raise damaged(folder / rng_file(0, 1), "missing, so the number of ranks is unknown")
        record["world_size"] = ranks
    return record


def finished_student(output: Path, record: dict[str, Any]) -> dict[str, float] | None:
    """Return the last evaluation of a run whose ``final/`` is saved, None if it is not, or is of other settings."""
    try:
        stored = json.loads((output / FINAL / SETTINGS_FILE).read_text(encoding="utf-8"))
        after = json.loads((output / ENDS_FILE).read_text(encoding="utf-8"))["after"]
        same = learning_settings({"world_size": record["world_size"], **stored}) == learning_settings(record)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return after if same and isinstance(after, dict) else None
