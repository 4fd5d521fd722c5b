"""The study's first part: gradients and AdamW updates from sparse labels against those of exact distillation.

A student at three stages of training; one batch after another of windows it has not seen, so that the first k windows
are a batch of k: what shrinks as k grows is noise, what stays is bias. Exact gradients are taken in float64.
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray, SoftLabels, temperature_index
from logitcask.pipeline.models.fused_loss import Target, fused_loss
from logitcask.pipeline.models.head import last_hidden_states, read_head
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.settings.precompute import PRESETS
from tests.benchmarks.fidelity import degrees, stored
from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.labels import Stored, TeacherFolder, Way, entries, shorter
from tests.benchmarks.study.students import CLIP, new_student, write_atomically

TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # windows
USED = 127  # target positions per window
STORED = {name: Stored(*sizes, TEMPERATURES) for name, sizes in PRESETS.items()} | {
    "random": Stored(0, 32, (1.0,)),
    "top": Stored(64, 0, TEMPERATURES),
}
USUAL = "top-64, one-token tail"
WAYS = {
    "lean": Way("lean", "sampled"),
    "standard": Way("standard", "sampled"),
    "rich": Way("rich", "sampled"),
    "random sampling, 32": Way("random", "sampled"),
    "top-12 renormalised": Way("top", "renormalize", 12),
    "top-64 renormalised": Way("top", "renormalize"),
    USUAL: Way("top", "bucket"),
    "top-64 bucket": Way("top", "bucket"),
}


@dataclass(frozen=True)
class Stage:
    """A student at some point of its training, with AdamW's state: mean (P,) and square (P,) of gradients, steps."""

    name: str
    student: PreTrainedModel
    mean_P: Tensor
    square_P: Tensor
    steps: int


def stage(name: str, vocabulary: int, saved: Path | None) -> Stage:
    """Return a new student, or one that the part on students saved."""
    student = new_student(vocabulary, 0)
    size = sum(p.numel() for p in student.parameters())
    if saved is None:
        return Stage(name, student, torch.zeros(size), torch.zeros(size), 0)
    state = torch.load(saved, weights_only=True)
    student.load_state_dict(state["student"])
    held = [state["optimizer"]["state"][i] for i in range(len(list(student.parameters())))]
    mean, square = (torch.cat([one[key].reshape(-1) for one in held]) for key in ("exp_avg", "exp_avg_sq"))
    return Stage(name, student, mean, square, int(held[0]["step"]))


def one_token_tail(where: TeacherFolder, rows: IntArray, temperature: float) -> SoftLabels[Tensor]:
    """Return labels with the usual tempering: the tail's mass at T=1 is raised to 1 / T as if it were one token's."""
    targets, how = where.targets("top", rows), where.stored["top"]
    log_tail = targets.log_tail_mass[:, temperature_index(how.temperatures, 1.0)]
    z = np.concatenate([targets.head_logprobs, log_tail[:, None]], axis=1) / temperature
    log_p = torch.log_softmax(torch.from_numpy(z).float(), dim=1)
    return SoftLabels(torch.from_numpy(targets.head_ids), log_p[:, :-1].exp(), log_p[:, :-1], log_p[:, -1], how.head)


def target_of(way: str, where: TeacherFolder, rows: IntArray, temperature: float) -> Target:
    """Return the target of the loss of some rows; exact: in float64."""
    if way == "exact":
        return where.exact.rows(rows, temperature, torch.float64)
    if way == USUAL:
        return one_token_tail(where, rows, temperature)
    return entries(where, WAYS[way], rows, temperature)


def gradients(student: PreTrainedModel, where: TeacherFolder, way: str, t: float) -> list[Tensor]:
    """Return the mean gradients (P,) of the soft loss over the first k windows, for each k in BATCHES, in float64."""
    dtype = torch.float64 if way == "exact" else torch.float32
    student = copy.deepcopy(student).to(dtype).eval()
    own, found = read_head(student), []
    how = LossSettings(0.0, t, WAYS[way].tail if way in WAYS else "sampled", "forward-kl")
    for window in range(max(BATCHES)):
        ids = torch.from_numpy(where.ids[window])[: USED + 1]
        rows = window * POSITIONS + np.arange(USED)
        hidden = last_hidden_states(student, ids[None])[0, :-1]
        sums = fused_loss(hidden, own, ids[1:], target_of(way, where, rows, t), how)
        torch.autograd.backward(sums.total)
        if window + 1 in BATCHES:
            whole = torch.cat([p.grad.reshape(-1).double() for p in student.parameters() if p.grad is not None])
            found.append(whole / ((window + 1) * USED))
    return found


def update(gradient_P: Tensor, at: Stage) -> Tensor:
    """Return the direction of AdamW's next step, with the gradient clipped as in training (betas 0.9 and 0.999)."""
    g = gradient_P * min(1.0, CLIP / float(gradient_P.norm()))
    t = at.steps + 1
    mean = (0.9 * at.mean_P + 0.1 * g) / (1 - 0.9**t)
    square = (0.999 * at.square_P + 0.001 * g * g) / (1 - 0.999**t)
    return mean / (square.sqrt() + 1e-8)


def sizes(where: TeacherFolder, vocabulary: int) -> dict[str, float]:
    """Return bytes per position of each way's label."""
    found: dict[str, float] = {}
    for way, how in WAYS.items():
        kept = where.stored[how.stored]
        short = Stored(how.head or kept.head, kept.draws, kept.temperatures).settings(vocabulary)
        targets = where.targets(how.stored, slice(None))
        found[way] = round(stored(shorter(targets, how.head), short)[1], 1)
    return found


def cell(at: Stage, where: TeacherFolder, temperature: float) -> dict[str, Any]:
    """Return angles and lengths of every way at one stage and temperature, by batch."""
    exact = gradients(at.student, where, "exact", temperature)
    found: dict[str, Any] = {}
    for way in WAYS:
        own = gradients(at.student, where, way, temperature)
        pairs = list(zip(own, exact, strict=True))
        found[way] = {
            "angle": [round(degrees(a, b), 3) for a, b in pairs],
            "length": [round(float(a.norm() / b.norm()), 4) for a, b in pairs],
            "update_angle": [round(degrees(update(a, at), update(b, at)), 3) for a, b in pairs],
        }
    return found


def measure(
    stages: list[Stage],
    text: str,
    where: TeacherFolder,
    folder: Path,
    part: tuple[int, int],
    until: float,
) -> None:
    """Compute the cells of part i of n that have no result yet, until it is time to stop."""
    jobs = [(at, t) for t in sorted(TEMPERATURES, key=lambda t: t not in (1.0, 2.0)) for at in stages]
    for at, t in jobs[part[0] :: part[1]]:
        path = folder / f"{text}_{at.name}_T{t:g}.json"
        if path.exists() or time.time() > until:
            continue
        found = cell(at, where, t)
        about = {"text": text, "stage": at.name, "steps": at.steps, "temperature": t, "batches": BATCHES}
        write_atomically(path, {**about, "ways": found})
        print(f"{path.stem}: {json.dumps({way: values['angle'][-1] for way, values in found.items()})}", flush=True)
