"""Logitcask beside its rivals' own code: the same teacher, text, student, weights and batches, on this machine.

    git clone https://github.com/arcee-ai/DistillKit && git clone https://github.com/axolotl-ai-cloud/axolotl
    git clone https://github.com/AI-Hypercomputer/maxtext
    pip install --no-deps --target packages liger-kernel==0.8.0
    pip install --no-deps --target packages jax jaxlib flax optax chex ml_dtypes opt_einsum absl-py toolz msgpack \\
        treescope orbax-checkpoint etils
    export PYTHONPATH=packages OMP_NUM_THREADS=1
    python -m tests.benchmarks.rivals FOLDER --distillkit DistillKit --axolotl axolotl --maxtext maxtext

prints the tables; what is not given is left out. Each part is kept in FOLDER when it is done and not measured again;
with all rivals the results go to tests/benchmarks/results/rivals.json. Processor time of one thread, since the machine
may be busy; about 20 minutes of it. Students are of the study's second teacher, which is trained first unless
FOLDER/second has it, the rest is of SmolLM2-135M.

Predicted on 2026-11-29, before the first run. Bytes per position: ours 64, DistillKit 330 (k=50: 120), axolotl 550.
Capture of a bare forward pass: ours 0.95, DistillKit 0.80. Reading: ours 20 times DistillKit, 20 times axolotl. Loss
and head alone, of plain cross-entropy: ours 0.95 in time and 0.4 in memory, DistillKit 1.5 and 2, axolotl 1.1 and 0.8,
TRL's GKD 4 and 3, DistillationTrainer's loss 2.5 and 1.2, both with the teacher. A step of the 100m student: ours 0.93
and 0.5, DistillKit 1.1 and 1.2, axolotl 1.05 and 0.9, GKD 1.6 and 1.6, DistillationTrainer's 1.4 and 1.2. Held-out KL
after the 300 steps: the exact KL least; ours alone within 0.03 of it, within 0.05 with its 0.1 of cross-entropy (and,
on 2026-11-30: of the preset rich half as far as standard's 0.14, of exact not distinguishable from the exact KL;
MaxText's, renormalised on both sides, no better than the text alone);
DistillKit's zero 0.05 worse, symmetric_uniform within 0.03; axolotl's, renormalised, 0.15 worse; DistillKit's default
0.1 worse; JSD 0.3 worse; cross-entropy 0.4 worse.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.rivals import speed, steps, table, trl
from tests.benchmarks.rivals.learning import train_all
from tests.benchmarks.rivals.stock import Sizes, label, outside, part, prepare
from tests.benchmarks.rivals.stores import GIVEN, learned_only, stores
from tests.benchmarks.rivals.systems import System, Text, plain
from tests.benchmarks.study import second
from tests.benchmarks.study.report import RESULTS, machine
from tests.benchmarks.study.students import write_atomically

SEEDS = {"second": 3}  # students per objective, by teacher


def compare(
    folder: Path, paths: dict[str, str], teachers: Mapping[str, str], sizes: Sizes, seeds: Mapping[str, int]
) -> dict[str, Any]:
    """Measure what is missing and return everything: students of the teachers in ``seeds``, the rest of the first."""
    first = next(iter(teachers))
    found = measure(folder / first, paths, teachers[first], sizes)
    students, masses = {}, {}
    for name, source in teachers.items():
        place, text = folder / name, text_of(source)
        stock, storing = prepare(place, text, sizes), stores(paths, text)
        masses[name] = part(place, "outside", [], partial(outside, stock))
        if name in seeds:
            others = learned_only(paths, text)
            label(place, stock, [*storing, *others])
            found["systems"] += part(place, "systems", [each.name for each in others], partial(named, others))[
                "systems"
            ]
            systems = [plain(), *storing, *others, *trl.load(stock.stored)]
            students[name] = train_all(place, stock, systems, sizes, seeds[name])
    return {**machine(), **found, "mass outside": masses, "students": students}


def text_of(source: str) -> Text:
    """Return what the systems must know of a teacher."""
    return Text(source, tokenizer_size(load_tokenizer(source)))


def measure(folder: Path, paths: dict[str, str], source: str, sizes: Sizes) -> dict[str, Any]:
    """Measure what is missing of labels, reading, capture and steps, and return it."""
    text = text_of(source)
    stock, storing = prepare(folder, text, sizes), stores(paths, text)
    systems = [plain(), *storing, *trl.load(stock.stored)]
    stepping = [system for system in systems if any(loss.timed for loss in system.losses)]
    names = [system.name for system in systems]
    measured = partial(part, folder, names=names)

    def timed_steps() -> dict[str, Any]:
        place = folder / "steps"
        steps.store(place, storing, text, sizes)
        return steps.measure(place, stepping, paths, text, sizes)

    return {
        **measured("systems", measure=lambda: named(systems[1:])),
        "left out": {name: f"no --{option}" for name, option in GIVEN.items() if option not in paths},
        "labels": measured("labels", measure=lambda: label(folder, stock, storing)),
        "read": measured("read", measure=lambda: speed.read(folder, storing, sizes)),
        "capture": measured("capture", measure=lambda: speed.capture(stock, storing, sizes)),
        "steps": timed_steps(),
    }


def named(systems: Sequence[System]) -> dict[str, Any]:
    """Return versions and commits."""
    return {"systems": [{"name": each.name, "version": each.version, "commit": each.commit} for each in systems]}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rivals", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    for option in GIVEN.values():
        parser.add_argument(f"--{option}", metavar="CHECKOUT")
    given = parser.parse_args()
    torch.set_num_threads(1)
    paths = {option: value for option in GIVEN.values() if (value := getattr(given, option))}
    second.load(given.folder / "second")  # trains it if it is not there
    teachers = {"SmolLM2-135M": teacher_path(), "second": str(given.folder / "second" / "final")}
    found = compare(given.folder / "out", paths, teachers, Sizes(), SEEDS)
    complete = not found["left out"]
    write_atomically(RESULTS / "rivals.json" if complete else given.folder / "rivals.json", found)
    print(table.report(json.loads(json.dumps(found))))


if __name__ == "__main__":
    main()
