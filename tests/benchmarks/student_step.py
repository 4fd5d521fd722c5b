"""What distillation costs the student compared with plain training: the loss alone, and a whole step.

Each row is a ratio of medians in one run, variants in turns. Peak memory (Linux) is that of a separate process less
what it held before: for a loss its inputs, for a step nothing, so that parameters and optimizer are in it. Steps are
timed in those processes, too: in a common one, what plain training left in the heap would spare ours the pages. Ours
and online run as ``logitcask train`` does on a CPU: some rows after the other, layers that keep the results of
products. Run as ``python -m tests.benchmarks.student_step [loss|step|online] [REPEATS]``; on two cores the
losses take about ten minutes, the steps about twenty, online beside a larger teacher about ten; 24 GB of memory.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.batches.collate import CPU_PART, Batch, in_parts
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
PLAIN_PARTS = "plain cross-entropy, some rows after the other"
OURS_1, USUAL, ONLINE = "ours, logit at T=1", "full logits, top-64, T=2", "online, teacher 135M in memory, fused"
THRIFTY = ("ours", "online")  # prefixes of the variants that train as ``logitcask train`` does
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
        OURS_1: lambda: backward(fused_loss(hidden, head, gold, sparse, LOGIT_1).total),
        USUAL: lambda: backward(peers(hidden @ weight.t(), gold, top, HYBRID)),
    }


def step_way(name: str, checkpointing: bool = False) -> Way:
    """Return a whole step of the 100m student in float32 with AdamW; each row's last position alone is no target."""
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    at = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)[:, :-1].reshape(-1)
    gold, n = ids.view(-1)[at + 1], len(at)
    batch: Batch = {"input_ids": ids, "target_index": at, "gold": gold, "is_token": torch.ones_like(ids).bool()}
    batch["slots"] = torch.tensor([ids.numel(), ids.numel()])
    student = student_from_config(STUDENT, VOCAB).train()
    thrifty = name.startswith(THRIFTY)
    if checkpointing:
        student.gradient_checkpointing_enable()
    elif thrifty:
        keep_products_only(student)
    how = LOGIT_1 if name == OURS_1 else HYBRID
    top = labels(n, VOCAB, TOP)

    def plain() -> Iterator[Tensor]:
        for part in [batch] if name == PLAIN else in_parts(batch, CPU_PART):
            shown = part["input_ids"]
            yield student(input_ids=shown, labels=shown).loss * len(shown) / BATCH

    def usual() -> Iterator[Tensor]:
        yield peers(student(input_ids=ids).logits.flatten(0, 1)[at], gold, top, HYBRID) / n

    def by_parts() -> Iterator[Tensor]:
        for part in in_parts(batch, CPU_PART):
            yield student(**part).total / n

    if thrifty:
        teacher = None if name.startswith("ours") else _teacher(name)
        if teacher is None:
            batch["soft_labels"] = labels(n, VOCAB)
        make_loss_forward(student, how, teacher)
    losses = by_parts if thrifty else usual if name == USUAL else plain
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)  # the Trainer's default

    def step() -> None:
        for loss in losses():
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _teacher(name: str) -> Callable[[Batch], TeacherRows]:
    """Return what gives the rows of a teacher in memory for a batch."""
    model = (
        student_from_config(TEACHER, VOCAB) if name == LARGE else load_causal_lm(teacher_path(), dtype=torch.float32)
    )
    head = read_head(model.eval())

    def rows(batch: Batch) -> TeacherRows:
        with torch.no_grad():
            hidden = last_hidden_states(model, batch["input_ids"]).flatten(0, 1)[batch["target_index"]]
        return TeacherRows(hidden, head, VOCAB)

    return rows


def _command(kind: str, name: str, vocab: int = 0, n: int = 0) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.student_step", "alone", kind, name, str(vocab), str(n)]


def peak(kind: str, name: str, vocab: int = 0, n: int = 0) -> float:
    """Return the peak memory in MB that two rounds of a variant add, in a separate process."""
    done = subprocess.run(_command(kind, name, vocab, n), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout)["mb"])


@contextmanager
def apart(name: str) -> Iterator[tuple[Way, float]]:
    """Start a process that repeats a variant of a step; yield what does so once, and the peak memory of two in MB."""
    command = _command("step", name)
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        said, given = child.stdout, child.stdin

        def again() -> None:
            given.write("again\n")
            given.flush()
            if not said.readline():
                sys.exit(f"{name}: its process ended")

        try:
            yield again, float(json.loads(said.readline())["mb"])
        finally:
            given.close()


def run_alone(kind: str, name: str, vocab: int, n: int) -> None:
    """Print the peak memory of two rounds, then repeat the variant, once per line of standard input."""
    way = loss_ways(vocab, n)[name] if kind == "loss" else None
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    way = way or step_way(name, kind == "checkpointed step")
    for _ in range(2):
        way()
    print(json.dumps({"mb": resident("VmHWM") - start}), flush=True)
    for _ in sys.stdin:
        way()
        print("done", flush=True)


def resident(name: str) -> float:
    """Return MB of memory as the system reports them: VmRSS is current, VmHWM the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def compare_steps(title: str, names: list[str], repeats: int) -> Table:
    """Return the table of variants of a step, each in a process of its own."""
    with ExitStack() as stack:
        started = {name: stack.enter_context(apart(name)) for name in names}
        ways, peaks = {n: way for n, (way, _) in started.items()}, {n: mb for n, (_, mb) in started.items()}
        return compare(title, ways, peaks, BATCH * LENGTH, repeats)


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
    if arguments[:1] == ["alone"]:
        run_alone(arguments[1], arguments[2], int(arguments[3]), int(arguments[4]))
        return
    console, repeats = Console(width=140), int(next((a for a in arguments if a.isdigit()), "5"))
    kinds = [a for a in arguments if not a.isdigit()] or ["loss", "step", "online"]
    if "loss" in kinds:
        for vocab, n in ((32_000, 512), (VOCAB, 512), (VOCAB, 2048), (128_256, 512), (262_144, 256)):
            ways = loss_ways(vocab, n)
            peaks = {name: peak("loss", name, vocab, n) for name in ways}
            console.print(compare(f"the loss alone, V={vocab:,}, {n:,} positions", ways, peaks, n, repeats))
    if "step" in kinds:
        title = f"a step of 100m, batch {BATCH} x {LENGTH}, V={VOCAB:,}"
        # not all at a time: the idle keep their heaps
        for names in ([PLAIN, OURS, OURS_1, ONLINE], [PLAIN, PLAIN_PARTS], [PLAIN, USUAL]):
            console.print(compare_steps(title, names, repeats))
        plain, ours = (peak("checkpointed step", name) for name in (PLAIN, OURS))
        console.print(f"with gradient checkpointing: {plain:,.0f} MB and {ours:,.0f} MB, {ours / plain:.2f} of plain")
    if "online" in kinds:
        title = f"the same, a larger teacher, medians of {repeats}"
        console.print(compare_steps(title, [PLAIN, OURS, LARGE], repeats))


if __name__ == "__main__":
    main()
