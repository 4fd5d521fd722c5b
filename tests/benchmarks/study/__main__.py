"""Run the study: ``python -m tests.benchmarks.study [--minutes N]``, or one stage: labels, designs, tune, students,
gradients, second, second-students, second-gradients (of another teacher), report.

Everything lands in ``study/`` and is not done again by the next call; ``report`` writes tests/benchmarks/results.
Two processes of one thread each by default; ``--part i/n`` is what they are started with.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.study import fidelity, figures, second
from tests.benchmarks.study.corpus import code_files, english, windows
from tests.benchmarks.study.designs import compare
from tests.benchmarks.study.labelling import label_windows
from tests.benchmarks.study.labels import MIDDLE, STORED, TeacherFolder
from tests.benchmarks.study.report import report
from tests.benchmarks.study.students import EPS, LENGTHS, REDRAWN, WINDOWS, Setting, Teacher, train, write_atomically

FOLDER = Path("study")
RUNS = FOLDER / "runs"
DESIGNS = FOLDER / "designs.json"
SECOND = FOLDER / "second"
STAGES_OF_WORK = ("labels", "designs", "tune", "students", "gradients", "second", "second-students", "second-gradients")
STAGES = {"early": LENGTHS[0], "late": LENGTHS[-1]}  # of a student's training, steps
HELD_OUT = 16  # windows
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4, 5, 6, 7)  # for differences of hundredths, with the second teacher
FIRST = ("exact", "standard", "top-64 renormalised")
THEN = ("lean", "random sampling, 32", "top-64 bucket", "top-12 renormalised")
ORDER = ((FIRST, 0.0), (FIRST[1:2], 0.5), (THEN, 0.0), (FIRST, 0.5), (THEN, 0.5))  # of the runs: ways, alpha
BETWEEN = (0.1, 0.25)  # alphas tried at T=1, with the standard label only
IDEAS = ("standard, half bucket", "standard, stratified draws", "standard, half the draws by need")
ALONE = ((1.0, "standard, drawn for T=1 alone"), (2.0, "standard, drawn for T=2 alone"))


def folders() -> tuple[TeacherFolder, TeacherFolder, int]:
    """Return training and held-out windows, and the size of the vocabulary."""
    tokenizer = load_tokenizer(teacher_path())
    train_ids = windows(code_files(held_out=False), tokenizer, LENGTHS[-1] * WINDOWS)
    held_ids = windows(code_files(held_out=True), tokenizer, HELD_OUT * 8)[::8]  # from several files
    return (
        TeacherFolder(FOLDER / "train", train_ids, STORED),
        TeacherFolder(FOLDER / "held_out", held_ids, {}),
        tokenizer_size(tokenizer),
    )


def the_teacher() -> Teacher:
    """Return what training needs of the teacher."""
    kept, held_out, vocabulary = folders()
    return Teacher(vocabulary, kept.labelled(), held_out.labelled())


def run_teacher() -> None:
    """Run the teacher over all windows, before several processes open their folders."""
    kept, held_out, _ = folders()
    for where in (held_out, kept, *texts().values()):
        where.run(teacher_path())


def label_part(part: tuple[int, int]) -> None:
    """Make the sparse labels of the windows."""
    kept, held_out, vocabulary = folders()
    for where in (held_out, kept, *texts().values()):
        label_windows(where, vocabulary, part)


def compare_designs(path: Path, teacher: Teacher) -> None:
    """Run the part on ways to draw, in closed form."""
    write_atomically(path, compare(teacher.train))


def texts() -> dict[str, TeacherFolder]:
    """Return the windows on which gradients are compared."""
    tokenizer, count = load_tokenizer(teacher_path()), max(fidelity.BATCHES)
    sources = {"code": code_files(held_out=True), "english": english()}
    return {
        name: TeacherFolder(FOLDER / name, windows(source, tokenizer, count), fidelity.STORED)
        for name, source in sources.items()
    }


def compare_gradients(part: tuple[int, int], until: float) -> None:
    """Run the part on gradients, at two stages of a student trained by exact distillation at T=1."""
    saved, teacher = saved_students(FOLDER), the_teacher()
    stages = [fidelity.stage("fresh", teacher.vocabulary, None)]
    stages += [fidelity.stage(name, teacher.vocabulary, path) for name, path in saved.items()]
    for name, text in texts().items():
        where = text.labelled()
        if part[0] == 0:
            write_atomically(FOLDER / "fidelity" / f"sizes_{name}.json", fidelity.sizes(where, teacher.vocabulary))
        fidelity.measure(stages, name, where, FOLDER / "fidelity", part, until)


def saved_students(folder: Path) -> dict[str, Path]:
    """Return the weights that the part on students saved, by stage."""
    saved = {name: folder / "states" / f"{kept_run(tuned()).name}_{steps}.pt" for name, steps in STAGES.items()}
    if missing := [path for path in saved.values() if not path.exists()]:
        raise SystemExit(f"{missing[0]}: is not there yet: train the students first, it is one of theirs")
    return saved


def kept_run(rate: float) -> Setting:
    """Return the run whose weights are saved for the part on gradients."""
    return Setting("exact", 1.0, 0.0, 0, rate)


def tuned() -> float:
    """Return the learning rate with the lowest held-out loss of output distillation, on a separate seed."""
    found = {rate: json.loads((RUNS / f"{tuning(rate).name}.json").read_text()) for rate in RATES}
    return min(found, key=lambda rate: float(found[rate]["lengths"][-1]["hard_loss"]))


def tuning(rate: float) -> Setting:
    """Return the run that tries a learning rate."""
    return Setting("output", 1.0, 1.0, 100, rate)


def grid(rate: float) -> list[Setting]:
    """Return SmolLM2's runs, the most informative first, seed by seed."""
    found = [Setting("output", 1.0, 1.0, seed, rate) for seed in SEEDS]
    for ways, alpha in ORDER:
        found += each_seed(ways, alpha, rate)
    found += between(rate)
    return list(dict.fromkeys(found))


def second_grid(rate: float) -> list[Setting]:
    """Return the second teacher's runs, which are faster: ideas, T=1 first; a falling rate; alphas; SmolLM2's runs."""
    found = [Setting("output", 1.0, 1.0, seed, rate) for seed in SEEDS]
    for t, alone in ALONE:
        usual = each_seed((*FIRST[:2], *IDEAS, alone), 0.0, rate) + each_seed(FIRST[:2], 0.0, rate, "beta2 0.95")
        found += [setting for setting in usual if setting.temperature == t]
    found += more_seeds(rate)
    found += each_seed((*FIRST, "rich"), 0.0, rate, "width 256")
    found += each_seed(FIRST, 0.0, rate, "cosine")
    found += between(rate)
    found += each_seed((*FIRST[:2], REDRAWN), 0.0, rate, "4 epochs")
    found += each_seed(FIRST, 0.0, rate, "4 times the batch") + each_seed(FIRST[:2], 0.0, rate, "rate 1.25")
    for t, training in ((1.0, "clipped at 0.2"), (1.0, "untied"), *[(2.0, eps) for eps in EPS]):
        found += [setting for setting in each_seed(FIRST[:2], 0.0, rate, training) if setting.temperature == t]
    for ways, alpha in ORDER:
        found += each_seed(ways, alpha, rate)
    return list(dict.fromkeys(found))


def between(rate: float) -> list[Setting]:
    """Return runs of intermediate alphas."""
    return [Setting("standard", 1.0, alpha, seed, rate) for seed, alpha in itertools.product(SEEDS, BETWEEN)]


def more_seeds(rate: float) -> list[Setting]:
    """Return the second teacher's runs that differ by hundredths: larger labels, default alpha, repeated exact runs."""
    found = each_seed(("rich",), 0.0, rate) + each_seed((*FIRST[:2], "rich"), 0.0, rate, seeds=MORE_SEEDS)
    found += [Setting("standard", 1.0, BETWEEN[0], seed, rate) for seed in MORE_SEEDS]
    found += each_seed(FIRST[:1], 0.0, rate, "jitter 1e-6", SEEDS + MORE_SEEDS)
    return found + each_seed((MIDDLE,), 0.0, rate, seeds=SEEDS + MORE_SEEDS)


def each_seed(
    ways: Sequence[str], alpha: float, rate: float, training: str = "usual", seeds: Sequence[int] = SEEDS
) -> list[Setting]:
    """Return some ways at T=1 and T=2, seed by seed."""
    return [Setting(way, t, alpha, seed, rate, training) for seed, t, way in itertools.product(seeds, (1.0, 2.0), ways)]


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Yield whether this process may compute a result; the system releases the lock however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not path.exists()


def run_all(
    folder: Path, teacher: Teacher, settings: list[Setting], until: float, lengths: tuple[int, ...] = LENGTHS
) -> None:
    """Train the runs that have no result and that no other process works on, until it is time to stop."""
    for setting in settings:
        path = folder / "runs" / f"{setting.name}.json"
        with claim(path) as free:
            if not free:
                continue
            if time.time() > until:
                print("out of time: the same command goes on from here", flush=True)
                return
            kept = folder / "states" if setting == kept_run(setting.learning_rate) else None
            found = train(setting, teacher, lengths, kept)
            write_atomically(path, found)
        print(f"{setting.name}: {json.dumps(found['lengths'][-1])}", flush=True)


def processes(stage: str, count: int, minutes: float) -> None:
    """Run a stage in several single-threaded processes."""
    command = [sys.executable, "-m", "tests.benchmarks.study", stage, "--minutes", str(minutes), "--part"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, f"{i}/{count}"], env=environment) for i in range(count)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"{stage} failed; what is done stays, the same command goes on")


def work(stage: str, part: tuple[int, int], until: float) -> None:
    """Run one process's part of a stage."""
    match stage:
        case "labels":
            label_part(part)
        case "designs" if part[0] == 0 and not DESIGNS.exists():
            compare_designs(DESIGNS, the_teacher())
        case "tune":
            run_all(FOLDER, the_teacher(), [tuning(rate) for rate in RATES], until, LENGTHS[1:2])
        case "students":
            run_all(FOLDER, the_teacher(), grid(tuned()), until)
        case "gradients":
            compare_gradients(part, until)
        case "second" if part[0] == 0:
            compare_designs(SECOND / "designs.json", second.prepare(SECOND))
        case "second-students":
            run_all(SECOND, second.prepare(SECOND), second_grid(tuned()), until)
        case "second-gradients":
            second.measure(SECOND, FOLDER / "fidelity", saved_students(SECOND), part, until)


def main() -> None:
    """Run the study; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.study", description=__doc__)
    parser.add_argument("stage", nargs="?", choices=[*STAGES_OF_WORK, "report"])
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run of a student after so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    until = time.time() + 60 * given.minutes
    if given.part is None:
        for stage in STAGES_OF_WORK if given.stage is None else [given.stage]:
            if stage == "labels":
                run_teacher()
            if stage != "report":
                processes(stage, given.processes, given.minutes)
        if given.stage in (None, "report"):
            report(RUNS)
            figures.main()
        return
    index, count = map(int, given.part.split("/"))
    torch.set_num_threads(1)
    work(given.stage, (index, count), until)


if __name__ == "__main__":
    main()
