"""What distillation costs the student compared with plain training: the loss alone, and a whole step.

Each row is a ratio of medians in one run, variants in turns. Peak memory (Linux) is that of a separate process less
what it held before: for a loss its inputs, for a step nothing, so that parameters and optimizer are in it. Ours and
online run as ``logitcask train`` does on a CPU: layers that keep the results of products, freed blocks given back, huge
pages. In the process that takes times all ways have huge pages, plain training too. Run as
``python -m tests.benchmarks.student_step [loss|step|online] [REPEATS]``; on two cores the losses take about ten
minutes, the steps about twenty, online beside a larger teacher about ten.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.machine import M_MMAP_THRESHOLD, free_large_blocks
from logitcask.pipeline.models.dense.rows import TeacherRows
from logitcask.pipeline.models.fused_loss import fused_loss
from logitcask.pipeline.models.head import SLICE_LOGITS, LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm, student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.train.loss import make_loss_forward
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.record import Ratio, record

STUDENT, TEACHER = Path("configs/students/100m.json"), Path("configs/students/1b.json")
VOCAB, WIDTH, BATCH, LENGTH = 49_152, 576, 8, 512
HEAD, DRAWS, TOP = 8, 24, 64
HYBRID = LossSettings(alpha=0.5, temperature=2.0, tail="sampled", divergence="forward-kl")
LOGIT_1 = LossSettings(alpha=0.0, temperature=1.0, tail="sampled", divergence="forward-kl")
PLAIN, OURS, LARGE = "plain cross-entropy", "ours, hybrid at T=2", "online, a random teacher of 0.95B in memory"
THRIFTY = ("ours", "online")  # prefixes of the variants that train as ``logitcask train`` does
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
GLIBC_LARGEST = 32 << 20  # largest heap block to which glibc adjusts its threshold by itself
Way = Callable[[], None]


def labels(n: int, vocab: int, entries: int = HEAD + DRAWS) -> SoftLabels[Tensor]:
    """Return labels of the standard preset's shape: their number affects the cost, their values do not."""
    ids = torch.stack([torch.randperm(vocab)[:entries] for _ in range(16)]).repeat(-(-n // 16), 1)[:n]
    weights = torch.rand(n, entries)
    return SoftLabels(ids, weights / weights.sum(1, keepdim=True), torch.zeros(n, entries) - 3, -torch.ones(n), HEAD)


def peers(logits: Tensor, gold: Tensor, top: SoftLabels[Tensor], how: LossSettings) -> Tensor:
    """Return the usual sparse loss: full logits, log-softmax, gather, with the head normalised to sum to 1."""
    hard = functional.cross_entropy(logits, gold, reduction="sum")
    log_q = functional.log_softmax(logits / how.temperature, dim=1).gather(1, top.ids)
    soft = -(top.weights * log_q).sum() * how.temperature**2
    return how.alpha * hard + (1 - how.alpha) * soft


def loss_ways(vocab: int, n: int) -> dict[str, Way]:
    """Return forward and backward of each loss from hidden states (n, WIDTH) and head weight (vocab, WIDTH)."""
    torch.manual_seed(0)
    hidden = torch.randn(n, WIDTH, requires_grad=True)
    weight = (torch.randn(vocab, WIDTH) / WIDTH**0.5).requires_grad_()
    gold, sparse, top = torch.randint(vocab, (n,)), labels(n, vocab), labels(n, vocab, TOP)
    rows = max(16, SLICE_LOGITS // vocab // 16 * 16)

    def products() -> None:
        h, w = hidden.detach(), weight.detach()
        grad = torch.zeros_like(w)
        for first in range(0, n, rows):
            z = torch.mm(h[first : first + rows], w.t())
            torch.mm(z, w)
            grad.addmm_(z.t(), h[first : first + rows])

    def backward(loss: Tensor) -> None:
        hidden.grad = weight.grad = None
        torch.autograd.backward(loss / n)

    head = LMHead(weight, None, 1.0, None)
    return {
        "the three matrix products": products,
        PLAIN: lambda: backward(functional.cross_entropy(hidden @ weight.t(), gold, reduction="sum")),
        OURS: lambda: backward(fused_loss(hidden, head, gold, sparse, HYBRID).total),
        "ours, logit at T=1": lambda: backward(fused_loss(hidden, head, gold, sparse, LOGIT_1).total),
        "full logits, top-64, T=2": lambda: backward(peers(hidden @ weight.t(), gold, top, HYBRID)),
    }


def step_ways(wanted: str | None = None, checkpointing: bool = False, alone: bool = False) -> dict[str, Way]:
    """Return whole steps of the 100m student in float32 with AdamW; each row's last position alone is no target."""
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    at = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)[:, :-1].reshape(-1)
    gold, n = ids.view(-1)[at + 1], len(at)
    found: dict[str, Way] = {}

    def add(name: str, make: Callable[[PreTrainedModel], Callable[[], Tensor]]) -> None:
        if wanted not in (None, name):
            return
        student = student_from_config(STUDENT, VOCAB).train()
        thrifty = name.startswith(THRIFTY)
        if checkpointing:
            student.gradient_checkpointing_enable()
        elif thrifty:
            keep_products_only(student)
        loss = make(student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)  # the Trainer's default

        def step() -> None:
            if thrifty:
                free_large_blocks()
            elif not alone:  # another variant made this process release everything
                ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GLIBC_LARGEST)
            torch.autograd.backward(loss())
            optimizer.step()
            optimizer.zero_grad()

        found[name] = step

    def plain(student: PreTrainedModel) -> Callable[[], Tensor]:
        return lambda: student(input_ids=ids, labels=ids).loss

    def ours(how: LossSettings) -> Callable[[PreTrainedModel], Callable[[], Tensor]]:
        sparse = labels(n, VOCAB)
        batch = {"input_ids": ids, "target_index": at, "gold": gold, "soft_labels": sparse}

        def make(student: PreTrainedModel) -> Callable[[], Tensor]:
            make_loss_forward(student, how)
            return lambda: student(**batch).total / n

        return make

    def usual(student: PreTrainedModel) -> Callable[[], Tensor]:
        top = labels(n, VOCAB, TOP)
        return lambda: peers(student(input_ids=ids).logits.flatten(0, 1)[at], gold, top, HYBRID) / n

    def online(load: Callable[[], PreTrainedModel]) -> Callable[[PreTrainedModel], Callable[[], Tensor]]:
        def make(student: PreTrainedModel) -> Callable[[], Tensor]:
            teacher = load().eval()
            head, own = read_head(teacher), read_head(student)

            def loss() -> Tensor:
                with torch.no_grad():
                    rows = last_hidden_states(teacher, ids).flatten(0, 1)[at]
                target, hidden = TeacherRows(rows, head, VOCAB), last_hidden_states(student, ids).flatten(0, 1)[at]
                return fused_loss(hidden, own, gold, target, HYBRID).total / n

            return loss

        return make

    add(PLAIN, plain)
    add(OURS, ours(HYBRID))
    add("ours, logit at T=1", ours(LOGIT_1))
    add("full logits, top-64, T=2", usual)
    add("online, teacher 135M in memory, fused", online(lambda: load_causal_lm(teacher_path(), dtype=torch.float32)))
    if wanted == LARGE:
        add(LARGE, online(lambda: student_from_config(TEACHER, VOCAB)))
    return found


def peak(kind: str, name: str, vocab: int, n: int) -> float:
    """Return the peak memory in MB that a variant adds, in a separate process."""
    command = [sys.executable, "-m", "tests.benchmarks.student_step", "peak", kind, name, str(vocab), str(n)]
    system = {key: value for key, value in os.environ.items() if key != HUGE_PAGES}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=system)
    return float(json.loads(done.stdout)["mb"])


def measure_peak(kind: str, name: str, vocab: int, n: int) -> None:
    """Print what ``peak`` reads."""
    way = loss_ways(vocab, n)[name] if kind == "loss" else None
    if kind != "loss" and name.startswith(THRIFTY):
        os.environ[HUGE_PAGES] = "1"  # as the command does; torch looks at the first large tensor
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    way = way or step_ways(name, kind == "checkpointed step", alone=True)[name]
    for _ in range(2):
        way()
    print(json.dumps({"mb": resident("VmHWM") - start}))


def resident(name: str) -> float:
    """Return MB of memory as the system reports them: VmRSS is current, VmHWM the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def compare(title: str, ways: dict[str, Way], peaks: dict[str, float], positions: int, repeats: int) -> Table:
    """Return medians over ``repeats`` rounds, with the variants taking turns, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    first, base = next(iter(ways)), median(times[PLAIN])
    table = Table(title, "seconds", "of plain", f"of {first}", "tokens/s", "peak MB", "of plain")
    for name, found in times.items():
        own = median(found)
        ratios = f"{own / base:.2f}", f"{own / median(times[first]):.2f}", f"{positions / own:,.0f}"
        table.add_row(name, f"{own:.2f}", *ratios, f"{peaks[name]:,.0f}", f"{peaks[name] / peaks[PLAIN]:.2f}")
    ours = [name for name in times if name.startswith("ours")]
    seconds = {f"{title}: s of {name} / plain": Ratio(times[name], times[PLAIN]) for name in ours}
    memory = {f"{title}: MB of {name} / plain": Ratio([peaks[name]], [peaks[PLAIN]]) for name in ours}
    record("student_step", {**seconds, **memory})
    return table


def main() -> None:
    """Print the requested tables, or both."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["peak"]:
        measure_peak(arguments[1], arguments[2], int(arguments[3]), int(arguments[4]))
        return
    console, repeats = Console(width=140), int(next((a for a in arguments if a.isdigit()), "5"))
    kinds = [a for a in arguments if not a.isdigit()] or ["loss", "step", "online"]
    if "loss" in kinds:
        for vocab, n in ((32_000, 512), (VOCAB, 512), (VOCAB, 2048), (128_256, 512), (262_144, 256)):
            ways = loss_ways(vocab, n)
            peaks = {name: peak("loss", name, vocab, n) for name in ways}
            console.print(compare(f"the loss alone, V={vocab:,}, {n:,} positions", ways, peaks, n, repeats))
    os.environ[HUGE_PAGES] = "1"
    if "step" in kinds:
        ways = step_ways()
        peaks = {name: peak("step", name, 0, 0) for name in ways}
        title = f"a step of 100m, batch {BATCH} x {LENGTH}, V={VOCAB:,}"
        console.print(compare(title, ways, peaks, BATCH * LENGTH, repeats))
        plain, ours = (peak("checkpointed step", name, 0, 0) for name in (PLAIN, OURS))
        console.print(f"with gradient checkpointing: {plain:,.0f} MB and {ours:,.0f} MB, {ours / plain:.2f} of plain")
    if "online" in kinds:
        ways = {name: step_ways(name)[name] for name in (PLAIN, OURS, LARGE)}
        peaks = {name: peak("step", name, 0, 0) for name in ways}
        title = f"the same, a larger teacher, medians of {repeats}"
        console.print(compare(title, ways, peaks, BATCH * LENGTH, repeats))


if __name__ == "__main__":
    main()
