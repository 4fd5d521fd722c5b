"""The demo's settings: students of SmolLM2's layers, healed in about the same processor time in one way or another.

Run as ``python -m tests.benchmarks.demo_settings [FOLDER]`` (3 minutes of one core per student; stopped, it continues
after the last finished one). It labels Python functions that are not among the demo's, trains a student per setting as
``logitcask train`` does, prints perplexity and KL to the teacher on others, and writes ``results/demo_settings.json``.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.evaluate.on_cache import evaluate_on_cache
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.gguf import parsed_once
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.students.layers import keep_layers
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.runs.run_folder import FINAL, write_json
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.study.report import machine

RESULTS = Path(__file__).parent / "results/demo_settings.json"
PRUNING = Path(__file__).parent / "results/pruning.json"
DEMO, VALIDATION, TRAINING, LENGTH = 92, 16, 96, 256  # functions, in this order, and tokens of each
BASE: dict[str, Any] = {"layers": 20, "examples": 78, "batch_size": 2, "learning_rate": 3e-4, "alpha": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "rate 1.5e-4": {"learning_rate": 1.5e-4},
    "rate 6e-4": {"learning_rate": 6e-4},
    "prompts labelled": {"prompt_loss": True, "examples": 70},
    "alpha 0.1": {"alpha": 0.1},
    "1 per step": {"batch_size": 1},
    "4 per step": {"batch_size": 4, "examples": 80},
    "22 layers": {"layers": 22, "examples": 72},
    "18 layers": {"layers": 18, "examples": 86},
}
PREDICTED = (
    "Labels of prompts too lower the KL by a tenth. Rate 6e-4 is as good as 3e-4, 1e-3 worse in KL. Alpha 0.1 lowers "
    "the KL by 0.05 and raises the perplexity by a tenth. One example per step is better than two, four are worse, by "
    "0.05 each. 22 layers end a third lower in KL, 18 a half higher."
)


def make_cache(folder: Path, name: str, prompt_loss: bool = False) -> CacheReader:
    """Make the cache of the ``training`` or ``validation`` functions, or finish it, and return it."""
    if not (folder / "all/train.jsonl").exists():
        from_source(None, folder / "all", DEMO + VALIDATION + TRAINING, seed=0)
    lines = (folder / "all/train.jsonl").read_text().splitlines(keepends=True)[DEMO:]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(lines[:VALIDATION] if name == "validation" else lines[VALIDATION:]))
    output = folder / f"{name}{'-prompts' if prompt_loss else ''}-cache"
    settings: dict[str, Any] = {"teacher_model": teacher_path(), "train_data": str(data), "output": output}
    settings |= {"max_seq_length": LENGTH, "prompt_loss": prompt_loss, "device": "cpu"}
    precompute(PrecomputeSettings.model_validate(settings))
    return CacheReader(str(output))


def layers(count: int) -> str:
    """Return the layers that are left if tests/benchmarks/pruning.py removes others by loss, of a shortlist of 4."""
    order = json.loads(PRUNING.read_text())["ways"]["loss, shortlist of 4"]["order"]
    return ",".join(str(layer) for layer in range(30) if layer not in order[: 30 - count])


def heal(folder: Path, run: Path, setting: dict[str, Any], validation: CacheReader) -> dict[str, Any]:
    """Train a student and return its steps, the processor time they took, and its figures on the validation set."""
    own = {**BASE, **setting}
    cache = make_cache(folder, "training", own.pop("prompt_loss", False))
    steps = own.pop("examples") // own["batch_size"]
    shutil.rmtree(run, ignore_errors=True)
    fixed = {"teacher_model": teacher_path(), "output_dir": run, "eval_fraction": 0, "warmup_steps": steps // 10}
    fixed |= {"cache": str(cache.path), "max_steps": steps, "init_from_teacher_layers": layers(own.pop("layers"))}
    began = time.process_time()
    run_training(TrainSettings.model_validate({**fixed, **own, "device": "cpu"}))
    took = time.process_time() - began
    figures = evaluate_on_cache(load_causal_lm(str(run / FINAL), dtype=torch.float32), validation, None, 2)
    shutil.rmtree(run)
    return {"steps": steps, "processor_seconds": round(took, 1), **_rounded(figures.perplexity, figures.kl[0].kl)}


def before(count: int, validation: CacheReader) -> dict[str, Any]:
    """Return the figures of a student that is not healed."""
    student = keep_layers(load_causal_lm(teacher_path(), dtype=torch.float32), layers(count))
    figures = evaluate_on_cache(student.eval(), validation, None, 2)
    return {"steps": 0, "processor_seconds": 0.0, **_rounded(figures.perplexity, figures.kl[0].kl)}


def _rounded(perplexity: float, kl: float) -> dict[str, float]:
    return {"perplexity": round(perplexity, 3), "kl": round(kl, 4)}


def main() -> None:
    """Train the students that are missing, print the table and write it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-settings")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not results:  # the prediction is written before there is anything to see
        results = {"machine": machine(), "predicted": PREDICTED, "base": BASE, "students": {}}
        write_json(RESULTS, results)
    students = results["students"]
    with parsed_once():
        validation = make_cache(folder, "validation")
        if "not healed" not in students:
            students["not healed"] = before(BASE["layers"], validation)
        for name in (name for name in SETTINGS if name not in students):
            students[name] = heal(folder, folder / "run", SETTINGS[name], validation)
            write_json(RESULTS, results)
    table = Table("setting", "steps", "processor s", "perplexity", "KL, nats")
    for name, row in students.items():
        table.add_row(
            name, str(row["steps"]), f"{row['processor_seconds']:.0f}", *map(str, (row["perplexity"], row["kl"]))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
