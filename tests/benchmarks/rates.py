"""What the default learning rates are worth: each, and ten times more and less, on the demo's teacher and data.

Run as ``python -m tests.benchmarks.rates [FOLDER]`` (25 minutes on one core; stopped, it continues where it was). It
makes a cache of Python functions with SmolLM2, trains nine students from it as ``logitcask train`` does, prints their
held-out losses and writes them to ``results/rates.json``, beside what was predicted before the first run. A pretrained
student is SmolLM2 itself on the functions' text, since a label of its own has nothing to teach it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.runs.run_folder import ENDS_FILE, latest_checkpoint, write_json
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.study.report import machine

EXAMPLES, LENGTH = 200, 192
TIMES = (0.1, 1.0, 10.0)
RESULTS = Path(__file__).parent / "results/rates.json"
STUDENTS: dict[str, dict[str, Any]] = {
    "new": {"student_config": "configs/students/tiny.json", "learning_rate": 5e-4, "max_steps": 40, "batch_size": 4},
    "layers": {
        "teacher_model": teacher_path(),
        "init_from_teacher_layers": "0,9,19,29",
        "learning_rate": 1e-4,
        "max_steps": 16,
        "batch_size": 4,
    },
    "pretrained": {
        "student_model": teacher_path(),
        "distillation_type": "output",
        "learning_rate": 1e-5,
        "max_steps": 8,
        "batch_size": 4,
    },
}
PREDICTED = (
    "Runs this short favour higher rates. New: 5e-3 best, 5e-4 behind it by about 1 nat, 5e-5 hardly moves. Layers: "
    "1e-3 best, 1e-4 behind by about half a nat, 1e-5 behind by two. Pretrained: 1e-5 and 1e-4 within 0.1 of each "
    "other and below the start, 1e-6 hardly moves; 1e-4 is the only one that could end above 1e-5."
)


def make_cache(folder: Path) -> Path:
    """Make the cache, or finish it, and return it."""
    data = folder / "data/train.jsonl"
    if not data.exists():
        from_source(None, data.parent, EXAMPLES, seed=0)
    settings: dict[str, Any] = {
        "teacher_model": teacher_path(),
        "train_data": str(data),
        "output": folder / "cache",
        "max_seq_length": LENGTH,
        "shard_positions": 4096,
        "device": "cpu",
    }
    precompute(PrecomputeSettings.model_validate(settings))
    return folder / "cache"


def train(cache: Path, run: Path, student: dict[str, Any], times: float) -> dict[str, Any]:
    """Train a student, or finish it, and return its evaluations before and after."""
    settings = TrainSettings.model_validate(
        {
            **student,
            "cache": str(cache),
            "output_dir": run,
            "learning_rate": student["learning_rate"] * times,
            "warmup_steps": student["max_steps"] // 10,
            "eval_fraction": 0.1,
            "save_steps": 8,
            "save_total_limit": 1,
            "logging_steps": 5,
            "device": "cpu",
            "resume_from_checkpoint": "latest" if latest_checkpoint(run) else None,
        }
    )
    if not (run / ENDS_FILE).exists():
        run_training(settings)
    ends: dict[str, Any] = json.loads((run / ENDS_FILE).read_text())
    return ends


def main() -> None:
    """Train the students that are missing, print the table and write it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/rates")
    results: dict[str, Any] = {"machine": machine(), "predicted": PREDICTED, "held_out_loss": {}}
    if not RESULTS.exists():  # the prediction is written before there is anything to see
        write_json(RESULTS, results)
    cache = make_cache(folder)
    table = Table("student", "before", *(f"default x {times:g}" for times in TIMES), title="held-out loss, nats")
    for name, student in STUDENTS.items():
        ends = {t: train(cache, folder / f"{name}-{t:g}", student, t) for t in TIMES}
        before = ends[1.0]["before"]["eval_total_loss"]
        after = {f"{student['learning_rate'] * t:.0e}": end["after"]["eval_total_loss"] for t, end in ends.items()}
        results["held_out_loss"][name] = {"before": before, "steps": student["max_steps"], "after": after}
        table.add_row(name, f"{before:.3f}", *(f"{rate}: {loss:.3f}" for rate, loss in after.items()))
        write_json(RESULTS, results)
    Console().print(table)


if __name__ == "__main__":
    main()
