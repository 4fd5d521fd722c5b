"""What exact labels cost a step, beside sparse ones and the teacher in memory, which has the student's width.

``loss``: the fused loss alone, forward and backward, of every divergence; ``step``: a whole step of the 100m student,
with peak memory of separate processes. Variants take turns; a time is the least processor time of one thread, since
the machine may be busy. Run as ``OMP_NUM_THREADS=1 python -m tests.benchmarks.exact_step [loss|step] [REPEATS]``;
results/exact_step.json has the outcome.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitcask.pipeline.models.dense.rows import CodedHead, ExactLabels
from logitcask.pipeline.models.fused_loss import fused_loss
from logitcask.pipeline.models.head import LMHead, read_head
from logitcask.pipeline.models.load import load_causal_lm, student_from_config
from logitcask.pipeline.models.losses import DIVERGENCES, LossSettings
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.train.loss import make_loss_forward
from logitcask.pipeline.train.sources.teacher import OnlineTeacher
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.student_step import HEAD, STUDENT, VOCAB, WIDTH, Way, labels, resident

ROWS, LENGTH, POSITIONS = 1, 256, 336  # of a whole step; positions of the loss alone, one slice of logits
SPARSE, EXACT, ONLINE = "sparse labels", "exact labels", "teacher in memory"
RESULTS = Path(__file__).parent / "results" / "exact_step.json"


def exact_labels(n: int) -> ExactLabels[Tensor]:
    """Return labels of n positions: their number affects the cost, their values do not."""
    head = LMHead(torch.randn(VOCAB, WIDTH) / WIDTH**0.5, None, 1.0, None)
    coded = CodedHead(head, torch.eye(WIDTH)[None], torch.zeros(1, WIDTH))
    return ExactLabels(
        ids=torch.stack([torch.randperm(VOCAB)[:HEAD] for _ in range(16)]).repeat(-(-n // 16), 1)[:n],
        log_probs=torch.full((n, HEAD), -3.0),
        log_tail=torch.full((n,), 0.5),
        tail_bias=torch.zeros(n),
        codes=torch.randint(-7, 8, (n, WIDTH), dtype=torch.int16),
        steps=torch.ones(n),
        source=torch.zeros(n, dtype=torch.long),
        temperature=2.0,
        anchor=2.0,
        teacher_head=lambda device: coded,
    )


def loss_ways() -> dict[str, Way]:
    """Return forward and backward of each loss at T=2 from hidden states and head weight."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(POSITIONS, WIDTH).requires_grad_(), (torch.randn(VOCAB, WIDTH) / 24).requires_grad_()
    gold, rows = torch.randint(VOCAB, (POSITIONS,)), exact_labels(POSITIONS).rows(torch.device("cpu"))

    def way(target: Any, divergence: str) -> Way:
        def run() -> None:
            hidden.grad = weight.grad = None
            how = LossSettings(0.5, 2.0, "sampled", divergence)
            torch.autograd.backward(fused_loss(hidden, LMHead(weight, None, 1.0, None), gold, target, how).total)

        return run

    sparse = {SPARSE: way(labels(POSITIONS, VOCAB), "forward-kl")}
    return sparse | {f"{EXACT}, {divergence}": way(rows, divergence) for divergence in DIVERGENCES}


def step_ways(wanted: str | None = None) -> dict[str, Way]:
    """Return whole steps of the 100m student in float32 with AdamW."""
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    at = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:, :-1].reshape(-1)
    batch: dict[str, Any] = {"input_ids": ids, "target_index": at, "gold": ids.view(-1)[at + 1]}
    found: dict[str, Way] = {}
    for name in (SPARSE, EXACT, ONLINE) if wanted is None else (wanted,):
        student = student_from_config(STUDENT, VOCAB).train()
        keep_products_only(student)
        teacher, own = None, {}
        if name == ONLINE:
            model = load_causal_lm(teacher_path(), dtype=torch.float32).eval().requires_grad_(False)
            teacher = OnlineTeacher(model, read_head(model), VOCAB, packs=False, fingerprint="")
        else:
            own = {"soft_labels": labels(len(at), VOCAB) if name == SPARSE else exact_labels(len(at))}
        make_loss_forward(student, LossSettings(0.5, 2.0, "sampled", "forward-kl"), teacher)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

        def step(student: Any = student, own: dict[str, Any] = own, optimizer: Any = optimizer) -> None:
            torch.autograd.backward(student(**batch, **own).total / len(at))
            optimizer.step()
            optimizer.zero_grad()

        found[name] = step
    return found


def times(ways: dict[str, Way], repeats: int) -> dict[str, float]:
    """Return the least processor seconds of each, in turns, after one round to warm up."""
    least = dict.fromkeys(ways, float("inf"))
    for number in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                least[name] = min(least[name], time.process_time() - start)
    return least


def peak(name: str) -> float:
    """Return the peak memory in MB of two steps of a variant in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.exact_step", "peak", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(name: str) -> None:
    """Print what ``peak`` reads: with all parameters, the optimizer's state, and the teacher's head or all of it."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    way = step_ways(name)[name]
    for _ in range(2):
        way()
    print(resident("VmHWM") - before)


def main() -> None:
    """Measure, print and keep what was asked for."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["peak"]:
        measure_peak(arguments[1])
        return
    repeats = int(next((a for a in arguments if a.isdigit()), "3"))
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in [a for a in arguments if not a.isdigit()] or ["loss", "step"]:
        seconds = times(loss_ways() if kind == "loss" else step_ways(), repeats)
        found[kind] = {
            name: {"cpu_seconds": round(own, 3), "of_sparse": round(own / seconds[SPARSE], 3)}
            for name, own in seconds.items()
        }
        if kind == "step":
            for name, row in found[kind].items():
                row["peak_mb"] = round(peak(name))
            found["head_mb"] = round(4e-6 * VOCAB * WIDTH)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
