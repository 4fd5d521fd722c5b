"""Checkpoints of a run: which one to resume from, what makes one complete, and errors while saving or loading one."""

import contextlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from logitcask.cache.errors import LogitcaskError, differences, first_line
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS
from logitcask.pipeline.models.adapters import has_adapter, load_adapter_weights
from logitcask.pipeline.runs.run_folder import (
    ENDS_FILE,
    FINAL,
    LOG_FILE,
    SETTINGS_FILE,
    complete_checkpoints,
    latest_checkpoint,
    step_of,
    write_json,
)

BASE_WEIGHTS = "base_weights"  # fingerprint of the weights that an adapter was trained on
# Settings that may change when a run is resumed: they affect what a step learns by rounding at most.
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "eval_steps"),
    *("num_workers", "use_wandb", "wandb_project", "wandb_run_name", "use_tensorboard", "use_trackio", "cache"),
    *("local_copies", "local_copies_gb", "min_fidelity", "device"),
    *("chat_turns", "chat_template", "columns"),  # the data itself is compared by its tokens
    *("on_bad_record", "max_bad"),
    *("data_config", "data_split", "where"),  # as is what a cache's examples are chosen by
    *("use_gradient_checkpointing", "use_mixed_precision", "mixed_precision_dtype", "wandb_run_id"),
    *("merge_lora", "save_dtype", "attn_implementation", "torch_compile", "trust_remote_code", BASE_WEIGHTS),
}
# What a run did before there were options for it, and stored nothing about.
BEFORE = {"lora_dropout": 0.0, "lora_target_modules": "all-linear", "student_dtype": "float32", "load_in_4bit": False}
ARGUMENTS_MAY_CHANGE = ("hub_", "push_", "log_", "ddp_", "torch_", "disable_tqdm", "skip_memory_metrics", "debug")
BATCH = ("batch_size", "gradient_accumulation_steps", "world_size")  # only their product affects what a step learns
STATE_FILE, WEIGHTS_FILE = "trainer_state.json", "model.safetensors"
HOLDS = {"optimizer.pt": "param_groups", "scheduler.pt": "last_epoch", "scaler.pt": "scale"}  # a key of each file
FSDP_SHARDED = ("pytorch_model_fsdp_0", "optimizer_0")  # folders of torch.distributed.checkpoint
FSDP_WHOLE = ("pytorch_model_fsdp.bin", "optimizer.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are complete and belong to this run."""

    folder: Path
    step: int  # optimizer steps done
    record: dict[str, Any]  # the settings stored with it, ``world_size`` included


def choose_checkpoint(
    output: Path, resume_from: str | None, record: dict[str, Any], *, fsdp: bool = False
) -> Checkpoint | None:
    """Return the checkpoint to resume from, None for a new run.

    ``record`` holds the settings of this run with its ``world_size``; ``fsdp``: whether it is sharded. A folder with
    nothing but a log, left by a run that saved no checkpoint, counts as empty. Raises LogitcaskError if the output
    folder is not empty, or the checkpoint is missing, damaged or of another run.
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
    try:
        changed = differences(_learning_settings(saved), _learning_settings(record), "checkpoint")
    except (TypeError, KeyError) as error:
        raise _damaged(folder / SETTINGS_FILE) from error
    if changed:
        raise LogitcaskError(
            f"{folder}: is a checkpoint of another run: {'; '.join(changed)}; use the settings it started with"
        )
    _require_same_sharding(folder, fsdp)
    step = _require_intact(folder, saved, record, fsdp)
    return Checkpoint(folder, step, saved)


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
        raise LogitcaskError(f"{option}: not a complete checkpoint of a run: {_instead_of(folder)}")


def _instead_of(folder: Path) -> str:
    """Return what to do without a checkpoint: resume from the next older complete one, or start over."""
    step = step_of(folder)
    older = [one for one in complete_checkpoints(folder.parent) if step is None or (step_of(one) or 0) < step]
    if older:
        return f"resume with --resume-from-checkpoint {older[-1]}"
    return "no older complete checkpoint is beside it: start over in another --output-dir"


def _damaged(file: Path, reason: str = "damaged") -> LogitcaskError:
    """Return the error for a checkpoint's file that is missing or damaged."""
    return LogitcaskError(f"{file}: {reason}: {_instead_of(file.parent)}")


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the settings stored with a checkpoint; before ``world_size`` was stored, its random states count ranks."""
    file = folder / SETTINGS_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file) from error
    if not isinstance(record, dict):
        raise _damaged(file)
    if "world_size" not in record:
        ranks = 1 if (folder / _rng_file(0, 1)).exists() else len(list(folder.glob("rng_state_[0-9]*.pth")))
        if not ranks:
            raise _damaged(folder / _rng_file(0, 1), "missing, so the number of ranks is unknown")
        record["world_size"] = ranks
    return record


def _learning_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine what a run learns at each step."""
    others = {name: value for name, value in {**BEFORE, **record}.items() if name not in {*MAY_CHANGE, *BATCH}}
    examples = 1
    for name in BATCH:
        examples *= int(record[name])
    arguments = {k: v for k, v in (record.get("training_args") or {}).items() if not k.startswith(ARGUMENTS_MAY_CHANGE)}
    return {**others, "training_args": arguments, " * ".join(BATCH): examples}


def _rng_file(rank: int, ranks: int) -> str:
    return "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"


def _require_same_sharding(folder: Path, fsdp: bool) -> None:
    sharded = any((folder / name).exists() for name in (*FSDP_SHARDED, *FSDP_WHOLE))
    if sharded != fsdp and (sharded or (folder / "optimizer.pt").exists()):
        with_it, without = "accelerate's FSDP", "no FSDP"
        saved, now = (with_it, without) if sharded else (without, with_it)
        raise LogitcaskError(
            f"{folder}: was saved with {saved}, this run has {now}: start it with the launcher it was started with"
        )


def _require_intact(folder: Path, saved: dict[str, Any], record: dict[str, Any], fsdp: bool) -> int:
    """Return the steps of a checkpoint. Raises LogitcaskError if a file is missing, cut short or not what it should be.

    The random states of another number of ranks are not used.
    """
    step = _steps_done(folder / STATE_FILE)
    if fsdp:
        _require_shards(folder)
    else:
        _require_weights(folder, adapter=saved.get("lora_rank") is not None)
    torch_files = ["scheduler.pt"] if fsdp else ["optimizer.pt", "scheduler.pt"]
    if all(part["use_mixed_precision"] and part["mixed_precision_dtype"] == "fp16" for part in (saved, record)):
        torch_files.append("scaler.pt")
    ranks, now = saved["world_size"], record["world_size"]
    if ranks == now:
        torch_files += [_rng_file(rank, ranks) for rank in range(ranks)]
    else:
        say(f"resuming on {now} ranks a run of {ranks}: each step has the same examples, but dropout draws anew")
    for name in torch_files:
        _require_torch_file(folder / name)
    return step


def _steps_done(state: Path) -> int:
    try:
        step = TrainerState.load_from_json(str(state)).global_step
        if type(step) is not int or step < 1:
            raise ValueError(step)
    except FileNotFoundError as error:
        raise _damaged(state, "missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(state) from error
    return step


def _require_shards(folder: Path) -> None:
    """Raise LogitcaskError if weights or optimizer, as FSDP saves them, are missing."""
    if any((folder / name).exists() for name in FSDP_WHOLE):
        for name in FSDP_WHOLE:
            _require_torch_file(folder / name)
        return
    for name in FSDP_SHARDED:
        if not (folder / name / ".metadata").is_file():
            raise _damaged(folder / name, "missing or incomplete")


def _require_weights(folder: Path, *, adapter: bool) -> None:
    """Raise LogitcaskError if the weights of a checkpoint, which may be those of an adapter, are missing or cut."""
    index = folder / "model.safetensors.index.json"
    files = {folder / (ADAPTER_WEIGHTS if adapter else WEIGHTS_FILE)}
    try:
        if index.exists():
            files = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(index) from error
    for file in sorted(files):
        try:
            with safe_open(file, "pt"):
                pass
        except FileNotFoundError as error:
            raise _damaged(file, "missing") from error
        except (OSError, SafetensorError) as error:
            raise _damaged(file, f"damaged ({first_line(error)})") from error


def _require_torch_file(file: Path) -> None:
    """Raise LogitcaskError if a file of torch is missing, has a changed byte, or holds more than plain values."""
    try:
        with zipfile.ZipFile(file) as archive:
            changed = archive.testzip()
        with safe_globals():
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise _damaged(file, "missing") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise _damaged(file, f"damaged ({first_line(error)})") from error
    key = HOLDS.get(file.name)
    if changed or not isinstance(value, dict) or (key is not None and key not in value):
        raise _damaged(file)


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Load a checkpoint's weights as ``from_pretrained`` does, which knows the names that each architecture stores.

    The Trainer's own loading leaves weights as the model was made if they are stored under other names, such as those
    of experts. Raises LogitcaskError if one is missing, of another shape, or not the model's.
    """
    if has_adapter(model):
        try:
            load_adapter_weights(checkpoint, model)
        except LogitcaskError as error:
            raise _damaged(checkpoint / ADAPTER_WEIGHTS, str(error)) from error
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
        raise _damaged(checkpoint / WEIGHTS_FILE, f"does not fit the student: {len(wrong)} weights, such as {wrong[0]}")
    model.load_state_dict(loaded.state_dict())


def finished_student(output: Path, record: dict[str, Any]) -> dict[str, float] | None:
    """Return the last evaluation of a run whose ``final/`` is saved, None if it is not, or is of other settings."""
    try:
        stored = json.loads((output / FINAL / SETTINGS_FILE).read_text(encoding="utf-8"))
        after = json.loads((output / ENDS_FILE).read_text(encoding="utf-8"))["after"]
        same = _learning_settings({"world_size": record["world_size"], **stored}) == _learning_settings(record)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return after if same and isinstance(after, dict) else None


def make_output(folder: Path) -> None:
    """Create the folder of a run. Raises LogitcaskError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogitcaskError(f"--output-dir {folder}: cannot be created: {error.strerror}: choose another") from error


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
                f"{checkpoint}: cannot be loaded: {first_line(error)}: {_instead_of(checkpoint)}"
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
