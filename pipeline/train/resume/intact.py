"""Whether the files of a checkpoint are all there and whole, and what to do if not."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.pipeline.console import say
from logitcask.pipeline.models.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS
from logitcask.pipeline.runs.run_folder import complete_checkpoints, step_of

STATE_FILE, WEIGHTS_FILE = "trainer_state.json", "model.safetensors"
HOLDS = {"optimizer.pt": "param_groups", "scheduler.pt": "last_epoch", "scaler.pt": "scale"}  # a key of each file
FSDP_SHARDED = ("pytorch_model_fsdp_0", "optimizer_0")  # folders of torch.distributed.checkpoint
DEEPSPEED = "latest"  # the name of its checkpoint's folder
FSDP_WHOLE = ("pytorch_model_fsdp.bin", "optimizer.bin")


def instead_of(folder: Path) -> str:
    """Return what to do without a checkpoint: resume from the next older complete one, or start over."""
    step = step_of(folder)
    older = [one for one in complete_checkpoints(folder.parent) if step is None or (step_of(one) or 0) < step]
    if older:
        return f"resume with --resume-from-checkpoint {older[-1]}"
    return "no older complete checkpoint is beside it: start over in another --output-dir"


def damaged(file: Path, reason: str = "damaged") -> LogitcaskError:
    """Return the error for a checkpoint's file that is missing or damaged."""
    return LogitcaskError(f"{file}: {reason}: {instead_of(file.parent)}")


def rng_file(rank: int, ranks: int) -> str:
    """Return the name of the file with a rank's random states."""
    return "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"


def require_same_sharding(folder: Path, fsdp: bool) -> None:
    """Raise LogitcaskError if only one of checkpoint and run has FSDP, or the checkpoint is of DeepSpeed."""
    if (folder / DEEPSPEED).is_file():
        raise LogitcaskError(
            f"{folder}: was saved by DeepSpeed, whose checkpoints are not resumed: start over, or train its weights "
            f"further with --student-model {folder} in another --output-dir"
        )
    sharded = any((folder / name).exists() for name in (*FSDP_SHARDED, *FSDP_WHOLE))
    if sharded != fsdp and (sharded or (folder / "optimizer.pt").exists()):
        with_it, without = "accelerate's FSDP", "no FSDP"
        saved, now = (with_it, without) if sharded else (without, with_it)
        raise LogitcaskError(
            f"{folder}: was saved with {saved}, this run has {now}: start it with the launcher it was started with"
        )


def require_intact(folder: Path, saved: dict[str, Any], record: dict[str, Any], fsdp: bool) -> tuple[int, int]:
    """Return the steps of a checkpoint and of its run.

    Raises LogitcaskError if a file is missing, cut short or not what it should be. The random states of another number
    of ranks are not used.
    """
    steps = _read_steps(folder / STATE_FILE)
    if fsdp:
        _require_shards(folder)
    else:
        _require_weights(folder, adapter=saved.get("lora_rank") is not None)
    torch_files = ["scheduler.pt"] if fsdp else ["optimizer.pt", "scheduler.pt"]
    if all(part["use_mixed_precision"] and part["mixed_precision_dtype"] == "fp16" for part in (saved, record)):
        torch_files.append("scaler.pt")
    ranks, now = saved["world_size"], record["world_size"]
    if ranks == now:
        torch_files += [rng_file(rank, ranks) for rank in range(ranks)]
    else:
        say(f"resuming on {now} ranks a run of {ranks}: each step has the same examples, but dropout draws anew")
    for name in torch_files:
        _require_torch_file(folder / name)
    return steps


def _read_steps(file: Path) -> tuple[int, int]:
    """Return the steps done and those of the whole run. Raises LogitcaskError if the file is missing or damaged."""
    try:
        state = TrainerState.load_from_json(str(file))
        steps = state.global_step, state.max_steps
        if not all(type(step) is int and step >= 1 for step in steps):
            raise ValueError(steps)
    except FileNotFoundError as error:
        raise damaged(file, "missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise damaged(file) from error
    return steps


def _require_shards(folder: Path) -> None:
    """Raise LogitcaskError if weights or optimizer, as FSDP saves them, are missing."""
    if any((folder / name).exists() for name in FSDP_WHOLE):
        for name in FSDP_WHOLE:
            _require_torch_file(folder / name)
        return
    for name in FSDP_SHARDED:
        if not (folder / name / ".metadata").is_file():
            raise damaged(folder / name, "missing or incomplete")


def _require_weights(folder: Path, *, adapter: bool) -> None:
    """Raise LogitcaskError if the weights of a checkpoint, which may be those of an adapter, are missing or cut."""
    index = folder / "model.safetensors.index.json"
    files = {folder / (ADAPTER_WEIGHTS if adapter else WEIGHTS_FILE)}
    try:
        if index.exists():
            files = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(index) from error
    for file in sorted(files):
        try:
            with safe_open(file, "pt"):
                pass
        except FileNotFoundError as error:
            raise damaged(file, "missing") from error
        except (OSError, SafetensorError) as error:
            raise damaged(file, f"damaged ({first_line(error)})") from error


def _require_torch_file(file: Path) -> None:
    """Raise LogitcaskError if a file of torch is missing, has a changed byte, or holds more than plain values."""
    try:
        with zipfile.ZipFile(file) as archive:
            changed = archive.testzip()
        with safe_globals():
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise damaged(file, "missing") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise damaged(file, f"damaged ({first_line(error)})") from error
    key = HOLDS.get(file.name)
    if changed or not isinstance(value, dict) or (key is not None and key not in value):
        raise damaged(file)
