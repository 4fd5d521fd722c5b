"""How far gradients from exact labels are from the teacher's own: per batch, on average, and along it.

Run as ``python -m tests.benchmarks.exact_gradients FOLDER [--divergences …]`` after ``exact_students FOLDER SEEDS 150
--smollm2`` has made its caches there; some twenty processor minutes. Students learn from the teacher in memory by each
divergence at T=1; after 0, 20, 60 and 150 steps, gradients of some batches are taken with it and with the labels.
Errors are norms of differences, relative to the norm; what noise of the labels is left in the mean falls with the
batches, what is left along the teacher's gradient would make steps longer or shorter. The batches' own spread, relative
to their mean, is what training lives with.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitcask.cache.labels import IntArray
from tests.benchmarks.exact_students import Run, Stock, Student, learning, open_stock
from tests.benchmarks.study.students import WINDOWS, write_atomically

RESULTS = Path(__file__).parent / "results" / "exact_gradients.json"
STEPS, BATCHES = (0, 20, 60, 150), 12
LABELS = ("exact", "exact-6")
DIVERGENCES = ("reverse-kl", "jsd")


def gradients(student: Student, way: str, batches: list[IntArray]) -> tuple[Tensor, float]:
    """Return the gradients of some batches (batches, parameters) with a way's targets, and their mean loss."""
    run, rows, total = Run(way, student.run.divergence, student.run.temperature, 0), [], 0.0
    with learning(student.model, run, student.stock):
        for examples in batches:
            batch = student.stock.batch(run, examples)
            loss = student.model(**batch).total / len(batch["gold"])
            torch.autograd.backward(loss)
            total += loss.item() / len(batches)
            rows.append(
                torch.cat([each.grad.flatten() for each in student.model.parameters() if each.grad is not None])
            )
            student.model.zero_grad()
    return torch.stack(rows), total


def compare(found: Tensor, right: Tensor) -> dict[str, float]:
    """Return the errors of gradients (batches, parameters)."""
    mean, error = right.mean(0), (found - right).mean(0)
    return {
        "one batch": float(((found - right).norm(dim=1) / right.norm(dim=1)).mean()),
        "mean": float(error.norm() / mean.norm()),
        "along": float(error @ mean / (mean @ mean)),
    }


def measure(stock: Stock, divergence: str) -> list[dict[str, Any]]:
    """Return what labels of each kind are off by, at each number of steps."""
    student, rows, done = Student(Run("online", divergence, 1.0, 0), stock), [], 0
    batches = [student.order[step * WINDOWS : (step + 1) * WINDOWS] for step in range(100, 100 + BATCHES)]
    for steps in STEPS:
        student.take(range(done, steps))
        done = steps
        right, loss = gradients(student, "online", batches)
        mean = right.mean(0)
        spread = float((right - mean).norm(dim=1).mean() / mean.norm())
        row: dict[str, Any] = {"divergence": divergence, "steps": steps, "loss": loss, "spread of batches": spread}
        for way in LABELS:
            found, shown = gradients(student, way, batches)
            row[way] = {"loss": shown, **compare(found, right)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=[*DIVERGENCES])
    given = parser.parse_args()
    stock = open_stock(given.folder / "smollm2-150", 150, LABELS, smollm2=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows = {name: [row for row in known["rows"] if row["divergence"] == name] for name in DIVERGENCES}
    rows |= {divergence: measure(stock, divergence) for divergence in given.divergences}
    write_atomically(RESULTS, {**known, "batches": BATCHES, "rows": [row for found in rows.values() for row in found]})


if __name__ == "__main__":
    main()
