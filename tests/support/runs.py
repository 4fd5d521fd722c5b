"""Short training runs of tiny students, and the files they leave."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from logitcask.pipeline.runs.run_folder import latest_checkpoint
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training

STUDENT: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def write_config(path: Path, config: dict[str, object]) -> Path:
    """Write a student config file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def train_settings(cache: Path | str | Sequence[str] | None, output: Path, **changes: object) -> TrainSettings:
    """Return the settings of a short run on the CPU; the student is ``STUDENT`` unless the changes name another."""
    values: dict[str, object] = {
        "cache": str(cache) if isinstance(cache, Path) else cache,
        "output_dir": output,
        "max_steps": 3,
        "warmup_steps": 0,
        "eval_fraction": 0.1,
        "logging_steps": 1,
        "device": "cpu",
        **changes,
    }
    if not {"student_config", "student_model", "init_from_teacher_layers"} & changes.keys():
        values["student_config"] = write_config(output.with_suffix(".json"), STUDENT)
    return TrainSettings.model_validate(values)


def train(cache: Path | str | Sequence[str] | None, output: Path, **changes: object) -> Path:
    """Train a run and return its folder."""
    run_training(train_settings(cache, output, **changes))
    return output


def history(run: Path) -> list[dict[str, float]]:
    """Return the training log lines of a run, one per step, from its last checkpoint."""
    last = latest_checkpoint(run)
    assert last is not None
    lines: list[dict[str, float]] = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [line for line in lines if "total_loss" in line]


def losses(run: Path, name: str = "total_loss") -> list[float]:
    """Return one loss per step."""
    return [line[name] for line in history(run)]


def metrics(run: Path) -> dict[str, Any]:
    """Return the evaluations before and after a run."""
    evaluations: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return evaluations


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder, by name."""
    return load_file(folder / "model.safetensors")
