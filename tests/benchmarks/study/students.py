"""The students of the study: one training run per setting; those of a seed share initial weights and batches.

A plain loop on the product's loss: AdamW, a warm-up, then a constant rate, so that one run shows several lengths; or
a rate that falls to nothing, as the product's own.
"""

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.labels import IntArray
from logitcask.pipeline.evaluate.on_cache import calibration_bins, calibration_error
from logitcask.pipeline.models.fused_loss import Target, fused_loss
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.losses import LossSettings
from tests.benchmarks.study import ideas
from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.labels import WAYS, TeacherFolder, entries

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LENGTHS = (75, 150, 300)  # steps after which a student is evaluated
WINDOWS = 4  # per step: 1,020 target positions
WARMUP, CLIP = 20, 1.0
ROWS = 256  # per pass of an evaluation


@dataclass(frozen=True)
class Training:
    """Differences from the usual training.

    ``epochs`` are passes over as many times fewer windows, ``batch`` takes as many times more of them a step, over as
    many times fewer steps.
    """

    beta2: float = 0.999
    eps: float = 1e-8  # AdamW's
    clip: float = CLIP  # maximum norm of the gradient
    tied: bool = True  # whether the student's embeddings are tied
    epochs: int = 1
    batch: int = 1
    cosine: bool = False
    times: float = 1.0  # factor on the learning rate
    width: int = CONFIG["hidden_size"]  # of the student
    jitter: float = 0.0  # relative, of the initial weights: shows how training amplifies a rounding error

    def rate(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at a step (from 1) of ``steps``."""
        if step <= WARMUP or not self.cosine:
            return self.times * min(1.0, step / WARMUP)
        return self.times * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


TRAININGS = {
    "usual": Training(),
    "beta2 0.95": Training(beta2=0.95),
    "clipped at 0.2": Training(clip=0.2),
    "untied": Training(tied=False),
    "4 epochs": Training(epochs=ideas.SETS),
    "4 times the batch": Training(batch=4),
    "cosine": Training(cosine=True),
    "rate 1.25": Training(times=1.25),
    "eps 1e-4": Training(eps=1e-4),
    "eps 3e-5": Training(eps=3e-5),
    "eps 1e-5": Training(eps=1e-5),
    "width 256": Training(width=256),
    "jitter 1e-6": Training(jitter=1e-6),
}
EPS = tuple(name for name in TRAININGS if name.startswith("eps"))  # tried at T=2


@dataclass(frozen=True)
class Setting:
    """Settings of one run."""

    way: str  # output, exact, one of EVERY_WAY, of MIXES or REDRAWN
    temperature: float
    alpha: float
    seed: int
    learning_rate: float
    training: str = "usual"

    @property
    def name(self) -> str:
        """Return the name of the run's file."""
        way = self.way.replace(",", "").replace(" ", "-")
        training = "" if self.training == "usual" else f"_{self.training.replace(' ', '-')}"
        return f"{way}_T{self.temperature:g}_alpha{self.alpha:g}_lr{self.learning_rate:g}_seed{self.seed}{training}"


EVERY_WAY = WAYS | ideas.WAYS
REDRAWN = "standard, redrawn each epoch"
MIXES = {"standard, half bucket": {"standard": 0.5, "standard bucket": 0.5}}  # shares of the loss


@dataclass(frozen=True)
class Teacher:
    """The teacher's labels of the training and held-out windows."""

    vocabulary: int
    train: TeacherFolder
    held_out: TeacherFolder


def new_student(vocabulary: int, seed: int, how: Training = TRAININGS["usual"]) -> PreTrainedModel:
    """Return a student with new weights of a seed, in float32."""
    torch.manual_seed(seed)
    widths = {"hidden_size": how.width, "intermediate_size": 3 * how.width}
    values = CONFIG | widths | {"tie_word_embeddings": how.tied, "vocab_size": vocabulary}
    config = AutoConfig.for_model(**values)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if how.jitter:
        with torch.no_grad():
            for weights in student.parameters():
                weights.mul_(1 + how.jitter * torch.randn_like(weights))
    return student


def target_of(way: str, temperature: float, teacher: Teacher, rows: IntArray) -> Target:
    """Return the target of a batch's loss."""
    if way == "output":
        return None
    if way == "exact":
        return teacher.train.exact.rows(rows, temperature)
    return entries(teacher.train, EVERY_WAY[way], rows, temperature)


def loss(
    setting: Setting, hidden_NH: Tensor, head: LMHead, gold_N: Tensor, teacher: Teacher, rows: IntArray, epoch: int
) -> Tensor:
    """Return the loss of a batch, summed over its N positions."""
    total = hidden_NH.new_zeros(())
    chosen = ideas.REDRAWN[epoch] if setting.way == REDRAWN else setting.way
    for way, share in MIXES.get(chosen, {chosen: 1.0}).items():
        target = target_of(way, setting.temperature, teacher, rows)
        how = LossSettings(setting.alpha, setting.temperature, tail_of(way), "forward-kl")
        total = total + share * fused_loss(hidden_NH, head, gold_N, target, how).total
    return total


def tail_of(way: str) -> str:
    """Return how a way treats the mass outside the head."""
    return EVERY_WAY[way].tail if way in EVERY_WAY else "sampled"


def batches(setting: Setting, windows: int, steps: int) -> list[tuple[int, IntArray]]:
    """Return epoch and windows of each step: they depend on the seed, not the label; each epoch is reshuffled."""
    how = TRAININGS[setting.training]
    epochs, size = how.epochs, WINDOWS * how.batch
    orders = [
        np.random.default_rng(setting.seed + 1000 * epoch).permutation(windows // epochs) for epoch in range(epochs)
    ]
    order = np.concatenate(orders)
    if steps * size > len(order):
        raise SystemExit(f"{steps} steps take {steps * size} windows, {len(order)} are labelled")
    return [
        (first * epochs // len(order), np.sort(order[first : first + size])) for first in range(0, steps * size, size)
    ]


def train(setting: Setting, teacher: Teacher, lengths: tuple[int, ...], keep: Path | None = None) -> dict[str, Any]:
    """Train to the longest of ``lengths`` steps; return held-out figures at each, and seconds of training.

    ``keep`` is a folder for the weights and the optimizer's state at each length.
    """
    how = TRAININGS[setting.training]
    student = new_student(teacher.vocabulary, setting.seed, how).train()
    head = read_head(student)
    betas, rate = (0.9, how.beta2), setting.learning_rate
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=betas, eps=how.eps, weight_decay=0.0)
    found, seconds, steps = [], 0.0, max(lengths) // how.batch
    for step, (epoch, windows) in enumerate(batches(setting, len(teacher.train.ids), steps), start=1):
        began = time.perf_counter()
        rows = (windows[:, None] * POSITIONS + np.arange(POSITIONS)).reshape(-1)
        ids = torch.from_numpy(teacher.train.ids[windows])
        hidden = last_hidden_states(student, ids)[:, :-1].flatten(0, 1)
        total = loss(setting, hidden, head, ids[:, 1:].reshape(-1), teacher, rows, epoch)
        torch.autograd.backward(total / len(rows))
        torch.nn.utils.clip_grad_norm_(student.parameters(), how.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate * how.rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
        if step in lengths and (
            step == steps or not how.cosine
        ):  # a falling rate gives a finished student only at the end
            found.append(
                {"steps": step, "positions": step * how.batch * WINDOWS * POSITIONS, **evaluate(student, teacher)}
            )
            found[-1]["training_seconds"] = round(seconds, 1)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, keep / f"{setting.name}_{step}.pt")
    return {"setting": dataclasses.asdict(setting), "lengths": found}


@torch.inference_mode()
def evaluate(student: PreTrainedModel, teacher: Teacher) -> dict[str, float]:
    """Return means over held-out positions: cross-entropy, exact KL to the teacher, agreement; calibration error."""
    student.eval()
    head, where, sums = read_head(student), teacher.held_out, np.zeros(4)
    bins = np.zeros((15, 2))
    for window in range(len(where.ids)):
        ids = torch.from_numpy(where.ids[window])
        hidden = last_hidden_states(student, ids[None])[0, :-1]
        rows = np.arange(window * POSITIONS, (window + 1) * POSITIONS)
        z = head.logits(hidden)[:, : teacher.vocabulary]
        log_p = {t: where.exact.log_probs(rows, t) for t in (1.0, 2.0)}
        gold = ids[1:]
        log_q = functional.log_softmax(z, dim=1)
        confidence, best = log_q.max(1)
        sums += [
            float(functional.nll_loss(log_q, gold, reduction="sum")),
            *(_kl(log_p[t], z, t) for t in (1.0, 2.0)),
            float((best == log_p[1.0].argmax(1)).sum()),
        ]
        bins += calibration_bins(confidence.exp().double().numpy(), (best == gold).numpy())
    student.train()
    count = len(where.ids) * POSITIONS
    names = ("hard_loss", "kl_at_1", "kl_at_2", "top1_agreement")
    means = {name: float(value) / count for name, value in zip(names, sums, strict=True)}
    return {**means, "calibration_error": calibration_error(bins, count)}


def _kl(log_p: Tensor, z: Tensor, t: float) -> float:
    log_q = functional.log_softmax(z / t, dim=1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def write_atomically(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
