"""The same student, initial weights, batches and steps for every objective; one judge of all."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray
from tests.benchmarks.rivals.stock import Sizes, Stock
from tests.benchmarks.rivals.systems import Loss, Read, System, windows_of
from tests.benchmarks.study.students import CLIP, WARMUP, Training, new_student, write_atomically

RATE = 2e-3
ROWS = 64  # target positions that are judged at once


@dataclass(frozen=True)
class Run:
    """One student."""

    system: System
    loss: Loss
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's file."""
        return f"{self.system.name}, {self.loss.name}, seed {self.seed}".replace("/", " ")


def train_all(folder: Path, stock: Stock, systems: Sequence[System], sizes: Sizes, seeds: int) -> list[dict[str, Any]]:
    """Train what is missing; return all runs."""
    runs = [Run(s, loss, seed) for seed in range(seeds) for s in systems for loss in s.losses]
    found = []
    for run in runs:
        path = folder / "parts" / "students" / f"{run.name}.json"
        if not path.exists():
            write_atomically(path, train(folder, run, stock, sizes))
            print(path.read_text(), flush=True)
        found.append(json.loads(path.read_text()))
    return found


def train(folder: Path, run: Run, stock: Stock, sizes: Sizes) -> dict[str, Any]:
    """Train one student on the stored labels of its system; return what the judge says of it."""
    vocabulary = stock.text.vocabulary
    student = new_student(vocabulary, run.seed, Training(width=sizes.width)).train()
    read: Read = run.system.read(folder / run.system.name) if run.system.read else windows_of(stock.ids)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    began = time.process_time()
    for step, numbers in enumerate(order(run.seed, sizes), start=1):
        torch.autograd.backward(run.loss.mean(student, read(numbers)))
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - began
    return {
        "system": run.system.name,
        "loss": run.loss.name,
        "seed": run.seed,
        "cpu_seconds": round(seconds, 1),
        **judge(student, stock),
    }


def order(seed: int, sizes: Sizes) -> list[IntArray]:
    """Return the windows of each step: all of them, shuffled, as often as the steps last."""
    needed = sizes.steps * sizes.per_step
    epochs = -(-needed // sizes.windows)
    whole = np.concatenate(
        [np.random.default_rng(seed + 1000 * epoch).permutation(sizes.windows) for epoch in range(epochs)]
    )
    return [np.sort(numbers) for numbers in whole[:needed].reshape(sizes.steps, sizes.per_step)]


@torch.inference_mode()
def judge(student: PreTrainedModel, stock: Stock) -> dict[str, float]:
    """Return means over the held-out positions in nats: the KL from the teacher's whole distribution, in float64.

    ``cross_entropy`` is the student's on the text, and ``teacher`` the teacher's.
    """
    student.eval()
    sums = np.zeros(3)
    for ids, hidden in zip(stock.held_ids, stock.held_hidden, strict=True):
        tokens = torch.from_numpy(ids)
        theirs, own, gold = stock.logits(hidden), student(input_ids=tokens[None]).logits[0, :-1], tokens[1:]
        for first in range(0, len(gold), ROWS):
            rows = slice(first, first + ROWS)
            log_p, log_q = (functional.log_softmax(z[rows].double(), dim=1) for z in (theirs, own))
            hard = [float(functional.nll_loss(log, gold[rows], reduction="sum")) for log in (log_q, log_p)]
            sums += [float((log_p.exp() * (log_p - log_q)).sum()), *hard]
    means = sums / (stock.held_ids.shape[0] * (stock.held_ids.shape[1] - 1))
    return dict(zip(("kl", "cross_entropy", "teacher"), means.tolist(), strict=True))
