"""Students of exact labels beside those of the teacher itself: held-out divergences, paired by seed.

The study's set-up with its second teacher (``study/second.py``): the same code, windows, students, rate, and 300 steps
of 1,020 positions. Labels come from caches that ``precompute-logits`` makes with its defaults. Predicted before it ran:
over the seeds the differences of ``exact`` from ``online`` are not distinguishable from 0 for any divergence and
temperature, and their means are below 0.01 nats, the sampled label's at T=2 being hundredths. Run as
``python -m tests.benchmarks.exact_students FOLDER [SEEDS] [STEPS] [--smollm2] [--ways …] [--divergences …]
[--rate …]``, resumable, by as many processes as are started once the first has made the caches; two processor minutes
per student of 300 steps. With fewer STEPS students are those of so many, on the same way. FOLDER may hold the teacher
in ``second``. With --smollm2 the teacher is SmolLM2, the study's first, the windows are as many as the steps take, and
students of 150 steps take two to eight processor minutes. At the study's rate two runs part, whatever their label;
with a smaller --rate less so. The teacher in memory is its last hidden states of all windows in float32, from one pass
before: what it would give at every step, for less time.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache.labels import IntArray
from logitcask.cache.reader import CacheReader, is_complete
from logitcask.pipeline.batches.collate import Batch, Collator, TrainingExample
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.models.dense.rows import TeacherRows
from logitcask.pipeline.models.fused_loss import fused_loss
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.train.loss import make_loss_forward
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.rivals.stock import states
from tests.benchmarks.study import second
from tests.benchmarks.study.__main__ import claim
from tests.benchmarks.study.corpus import code_files, windows
from tests.benchmarks.study.exact import make
from tests.benchmarks.study.report import interval
from tests.benchmarks.study.students import CLIP, LENGTHS, WARMUP, WINDOWS, new_student, write_atomically

STEPS, RATE, HELD_OUT = max(LENGTHS), 2e-3, 32  # the study's; windows
RESULTS = Path(__file__).parent / "results" / "exact_students.json"
CACHES: dict[str, dict[str, Any]] = {
    "exact": {"preset": "exact"},
    "exact-6": {"preset": "exact", "hidden_bits": 6},
    "exact-8": {"preset": "exact", "hidden_bits": 8},
    "standard": {"preset": "standard"},
}
IN_MEMORY = ("online", "rounded")  # as it is, and with its states in bfloat16: pairs that part for no other reason
WAYS = ("online", "exact", "standard")  # unless others are asked for


@dataclass(frozen=True)
class Run:
    """What one student learns from, and by which loss."""

    way: str  # one of IN_MEMORY, or the cache's name
    divergence: str
    temperature: float
    seed: int
    rate: float = RATE

    @property
    def name(self) -> str:
        """The name of the run's file."""
        return f"{self.way}_{self.divergence}_T{self.temperature:g}_seed{self.seed}"

    @property
    def tail(self) -> str:
        """How the loss takes what its label has outside the head."""
        return "exact" if self.way.startswith("exact") else "sampled"


LOSSES = (("forward-kl", 2.0), ("reverse-kl", 1.0), ("jsd", 1.0), ("forward-kl", 1.0))


def runs(seeds: int, ways: list[str], divergences: list[str], rate: float) -> list[Run]:
    """Return all runs, pairs together; a sparse label has no divergence but forward KL."""
    return [
        Run(way, divergence, t, seed, rate)
        for seed, (divergence, t), way in itertools.product(range(seeds), LOSSES, ways)
        if divergence in divergences and (way != "standard" or divergence == "forward-kl")
    ]


def make_caches(
    folder: Path, teacher: Path, tokenizer: PreTrainedTokenizerBase, count: int, names: list[str]
) -> dict[str, CacheReader]:
    """Make those caches of so many training windows that are not there; return all, open."""
    if not all(is_complete(folder / name) for name in names):
        ids = windows(code_files(held_out=False), tokenizer, count)
        for name in names:
            make(folder / name, str(teacher), ids, CACHES[name])
    readers = {name: CacheReader(folder / name, kept_bytes=2 << 30) for name in names}
    for reader in readers.values():
        reader.keep(reader.manifest.shards.count)  # batches are of examples from anywhere
    return readers


class Teacher:
    """The last hidden states of some windows (windows, N, W), with the head that reads them."""

    def __init__(self, model: PreTrainedModel, ids: IntArray, file: Path) -> None:
        if not file.exists():
            partial = file.with_suffix(".partial.npy")
            np.save(partial, states(model, ids))
            partial.replace(file)
        self.head: LMHead = read_head(model)
        self.vocab_size = len(self.head.weight)
        self._hidden = np.load(file, mmap_mode="r")
        self._places = {row.tobytes(): place for place, row in enumerate(ids)}

    def __call__(self, batch: Batch, dtype: torch.dtype = torch.float32) -> TeacherRows:
        """Return the hidden states of a batch's windows, each of which is a row, rounded to a dtype."""
        places = [self._places[row.tobytes()] for row in batch["input_ids"].numpy()]
        hidden = torch.from_numpy(self._hidden[places]).flatten(0, 1).to(dtype).float()
        return TeacherRows(hidden, self.head, self.vocab_size)


@dataclass(frozen=True)
class Stock:
    """The teacher, and the caches by name."""

    teacher: Teacher
    readers: dict[str, CacheReader]
    held_out: IntArray  # (windows, tokens)

    def batch(self, run: Run, examples: IntArray) -> Batch:
        """Return a batch; the caches have the same examples in the same order."""
        reader = self.readers.get(run.way, self.readers["exact"])
        stored = tuple(reader.manifest.label.temperatures)
        head = StoredHead(((reader.path, reader.opened),)) if run.tail == "exact" else None
        collator = Collator(0, stored, run.temperature, run.tail, teacher_head=head)
        found = [reader.example(int(i)) for i in examples]
        with_labels = run.way not in IN_MEMORY
        return collator(
            [TrainingExample(Encoded(e.input_ids, e.target_mask), e.targets if with_labels else None) for e in found]
        )


@contextmanager
def learning(student: PreTrainedModel, run: Run, stock: Stock) -> Iterator[None]:
    """Let a student's forward pass return the loss of a run's batches."""
    plain, teacher = student.forward, None
    if run.way in IN_MEMORY:
        teacher = partial(stock.teacher, dtype=torch.bfloat16 if run.way == "rounded" else torch.float32)
    make_loss_forward(student, LossSettings(0.0, run.temperature, run.tail, run.divergence), teacher)
    yield
    student.forward = plain


class Student:
    """A new student of a run's seed, its optimizer and the order of its windows."""

    def __init__(self, run: Run, stock: Stock) -> None:
        self.run, self.stock = run, stock
        self.model = new_student(stock.teacher.vocab_size, run.seed).train()
        self.order = np.random.default_rng(run.seed).permutation(len(stock.readers["exact"]))
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=run.rate, weight_decay=0.0)

    def take(self, steps: range) -> None:
        """Take some steps of the run."""
        with learning(self.model, self.run, self.stock):
            for step in steps:
                batch = self.stock.batch(self.run, self.order[step * WINDOWS : (step + 1) * WINDOWS])
                torch.autograd.backward(self.model(**batch).total / len(batch["gold"]))
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
                for group in self._optimizer.param_groups:
                    group["lr"] = self.run.rate * min(1.0, (step + 1) / WARMUP)
                self._optimizer.step()
                self._optimizer.zero_grad()


def train(run: Run, stock: Stock, steps: int) -> dict[str, Any]:
    """Train a student; return its held-out divergences from the teacher."""
    student = Student(run, stock)
    began = time.process_time()
    student.take(range(steps))
    seconds = time.process_time() - began
    return {**vars(run), "cpu_seconds": round(seconds, 1), "held_out": evaluate(student.model, stock)}


@torch.no_grad()
def evaluate(student: PreTrainedModel, stock: Stock) -> dict[str, float]:
    """Return mean divergences from the teacher over the held-out positions, by name and temperature, in nats."""
    head, sums = read_head(student.eval()), dict.fromkeys(LOSSES, 0.0)
    for row in stock.held_out:
        ids = torch.from_numpy(row)[None]
        hidden, gold = last_hidden_states(student, ids)[0, :-1], ids[0, 1:]
        target = stock.teacher({"input_ids": ids, "target_index": torch.arange(len(gold))})
        for divergence, t in LOSSES:
            how = LossSettings(0.0, t, "exact", divergence)
            sums[divergence, t] += float(fused_loss(hidden, head, gold, target, how).soft) / t**2
    count = stock.held_out.shape[0] * (stock.held_out.shape[1] - 1)
    return {f"{divergence} at T={t:g}": value / count for (divergence, t), value in sums.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by loss: the divergence of online students, and how much more others have, with intervals of 95 %."""
    ends = {(r["way"], r["divergence"], r["temperature"], r["seed"]): r["held_out"] for r in found}
    table: dict[str, Any] = {}
    for divergence, t in LOSSES:
        name = f"{divergence} at T={t:g}"
        of = {
            way: {k[3]: v[name] for k, v in ends.items() if k[:3] == (way, divergence, t)}
            for way in (*IN_MEMORY, *CACHES)
        }
        online, table[name] = of["online"], {}
        if online:
            table[name]["online"] = round(float(np.mean(list(online.values()))), 4)
        for way in ("rounded", *CACHES):
            pairs = [value - online[seed] for seed, value in of[way].items() if seed in online]
            mean, half = interval(pairs) if pairs else (0.0, None)
            if half is not None:
                table[name][way] = {"more": round(mean, 5), "±": round(half, 5)}
    return table


def open_stock(folder: Path, steps: int, ways: Sequence[str], *, smollm2: bool) -> Stock:
    """Make what is missing of a teacher's states and the caches of some ways; return them."""
    if smollm2:
        teacher = Path(teacher_path())
        model, tokenizer = load_causal_lm(str(teacher), dtype=torch.float32).eval(), load_tokenizer(str(teacher))
    else:
        teacher = folder / "second" / "final"
        model, tokenizer = second.load(folder / "second")
    names = [name for name in CACHES if name == "exact" or name in ways]  # that one gives the windows' order
    readers = make_caches(folder, teacher, tokenizer, WINDOWS * (steps if smollm2 else STEPS), names)
    cached = np.stack([readers["exact"].example(place).input_ids for place in range(len(readers["exact"]))])
    held_out = windows(code_files(held_out=True), tokenizer, HELD_OUT * 8)[::8]
    shown = np.concatenate([cached.astype(np.int64), held_out])
    return Stock(Teacher(model, shown, folder / "states.npy"), readers, held_out)


def main() -> None:
    """Train what is missing and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seeds", type=int, nargs="?", default=3)
    parser.add_argument("steps", type=int, nargs="?", default=STEPS)
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=[*IN_MEMORY, *CACHES], default=[*WAYS])
    parser.add_argument("--divergences", nargs="+", choices=["forward-kl", "reverse-kl", "jsd"])
    parser.add_argument("--rate", type=float, default=RATE)
    given = parser.parse_args()
    folder = given.folder / f"smollm2-{given.steps}" if given.smollm2 else given.folder
    stock = open_stock(folder, given.steps, given.ways, smollm2=given.smollm2)
    rate = "" if given.rate == RATE else f"at a rate of {given.rate:g}"
    name = f"{'SmolLM2, ' if given.smollm2 else ''}{given.steps} steps {rate}".strip()
    place = folder / f"{given.steps}-steps {rate}".strip().replace(" ", "-")
    divergences = given.divergences or [divergence for divergence, _ in LOSSES]
    for run in runs(given.seeds, given.ways, divergences, given.rate):
        path = place / f"{run.name}.json"
        with claim(path) as free:
            if free:
                write_atomically(path, train(run, stock, given.steps))
                print(path.read_text(), flush=True)
    found = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    write_atomically(RESULTS, {**results, name: {"summary": summary(found), "runs": found}})
    print(json.dumps(summary(found), indent=1))


if __name__ == "__main__":
    main()
