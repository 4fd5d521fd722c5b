"""What --select saves and costs: CPU time of a step, and held-out losses after as many steps as without it.

The time is that of forward and backward of a student on the first batch of a cache, variants in turns, the median of
some repeats; the losses are those of whole runs of one student each. Run as
``python -m tests.benchmarks.selection CACHE [STEPS [CONFIG]]``; CONFIG is a student's, ``tiny`` unless given.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.settings.base import config_file
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.loss import make_loss_forward
from logitcask.pipeline.train.selection import Selection
from logitcask.pipeline.train.train import run_training

SELECTIONS = (None, "entropy:0.2", "teacher-entropy:0.2")
ALPHAS = {"logit": 0.0, "hybrid": 0.1}
BATCH, REPEATS = 8, 7


def step_seconds(cache: Path, config: Path) -> dict[tuple[str, str | None], float]:
    """Return the median CPU seconds of a forward and backward pass, by type of distillation and selection."""
    source, label = CacheExamples(str(cache), with_targets=True), CacheReader(cache).manifest.label
    batch = Collator(0, tuple(label.temperatures), 1.0, "sampled", True)([source[i] for i in range(BATCH)])
    ways: dict[tuple[str, str | None], Callable[[], None]] = {}
    for kind, alpha in ALPHAS.items():
        for select in SELECTIONS:
            torch.manual_seed(0)
            model = student_from_config(config, label.vocab_size).train()
            by, _, share = (select or "").partition(":")
            selection = Selection(by, float(share)) if select else None
            make_loss_forward(model, LossSettings(alpha, 1.0, "sampled", "forward-kl"), selection=selection)
            scale = 1.0 if selection is None else len(batch["gold"]) / float(selection.counts(batch)[1].sum())

            def step(model: torch.nn.Module = model, scale: float = scale) -> None:
                model.zero_grad()
                torch.autograd.backward(model(**batch, soft_scale=scale).total)

            ways[kind, select] = step
    times: dict[tuple[str, str | None], list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            before = time.process_time()
            way()
            times[name].append(time.process_time() - before)
    return {name: median(part) for name, part in times.items()}


def held_out(cache: Path, config: Path, steps: int, kind: str, select: str | None) -> dict[str, float]:
    """Return the held-out losses after a run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "cache": str(cache),
            "student_config": config,
            "output_dir": folder,
            "max_steps": steps,
            "select": select,
        }
        settings = {"distillation_type": kind, "batch_size": BATCH, "learning_rate": 2e-3, "eval_fraction": 0.15}
        run_training(TrainSettings.model_validate({**flags, **settings, "device": "cpu", "save_steps": 10**6}))
        after: dict[str, float] = json.loads((Path(folder) / "metrics.json").read_text())["after"]
        return after


def main() -> None:
    """Measure and print a table."""
    cache, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    config = config_file("students", sys.argv[3] if len(sys.argv) > 3 else "tiny")
    seconds = step_seconds(cache, config)
    table = Table("distillation", "select", "CPU s per step", "ratio", "held out: KL, nats", "hard loss, nats")
    for (kind, select), own in seconds.items():
        after = held_out(cache, config, steps, kind, select)
        kl, hard = after["eval_soft_loss"], after["eval_hard_loss"]
        ratio = own / seconds[kind, None]
        table.add_row(kind, select or "all", f"{own:.3f}", f"{ratio:.2f}", f"{kl:.3f}", f"{hard:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
