"""Healing a pruned model: which objective brings a teacher's remaining layers back soonest, at equal steps and batches?

Run as ``python -m tests.benchmarks.healing [FOLDER] [--hours 14] [--small]``. The student is SmolLM2-135M-Instruct
without a third of its layers, the same ones for every objective; the caches are made once. Every run is a run of
``logitcask train``, resumes where it stopped, and counts in core-hours; no run is begun once the budget is used up. It
may be started several times beside itself: with OMP_NUM_THREADS=1 and a process per core nobody waits for a thread.
Results stand in ``tests/benchmarks/results/healing.json``, beside what was predicted before the first run. ``--small``
tries the whole on a few examples, in minutes, and writes its results into the folder.
"""

import argparse
import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from logitcask.cache.reader import is_complete
from logitcask.cache.report.info import describe
from logitcask.cache.storage.staging import lock_file
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.models.generate import answer
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.runs.run_folder import ENDS_FILE, latest_checkpoint
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.healing import corpus
from tests.benchmarks.study.report import machine
from tests.benchmarks.study.students import write_atomically

RESULTS = Path("tests/benchmarks/results/healing.json")
PRUNING = Path("tests/benchmarks/results/pruning.json")
LENGTH = 320
QUARTER = 0.25  # of the data: what most runs read
LAYERS = (24, 20, 16)  # left of the teacher's 30
DRAWS = "draws alone, as RS-KD"
LABELS: dict[str, dict[str, Any]] = {
    "standard": {"preset": "standard"},
    "exact labels": {"preset": "exact"},
    "top-64 renormalised": {"head_size": 64, "tail_draws": 0},
    "rich": {"preset": "rich"},
    "lean": {"preset": "lean"},
    DRAWS: {"head_size": 0, "tail_draws": 50, "temperatures": "1"},
}
FIGURES = ("perplexity", "kl", "top1_agreement", "calibration_error")
AT_TWO = ("exact", "standard", "exact labels", "top-64 renormalised")  # the objectives of both temperatures
SMOLLM2 = {"teacher_model": teacher_path(), "device": "cpu"}
TRAINING = {"learning_rate": 3e-4, "warmup_steps": 10, "batch_size": 4, "logging_steps": 20, "save_steps": 50}
PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the capital of France? Answer in one sentence.",
    "Explain in two sentences what a hash table is.",
)
SHOWN = 120  # characters of an answer
PREDICTED = (
    "After a first table of T=1 (results/healing_first.json), before any run of this one. At T=1 and 100k positions, "
    "held-out KL: exact online 0.70, exact labels and rich within 0.01 of it, standard within 0.015, lean and draws "
    "alone within 0.02, top-64 renormalised 0.04 worse and worse calibrated, cross-entropy 1.05. At T=2 exact is 0.03 "
    "behind its T=1 on KL at T=1 and 0.01 ahead on KL at T=2, exact labels within 0.01 of it, standard 0.05 and 0.02 "
    "behind it, top-64 0.2 and 0.15. At 400k: exact 0.5, standard within 0.01 of it, cross-entropy 0.95. 24 layers "
    "0.35, 16 layers 1.2 at 100k. HumanEval: the teacher 4 %, every student within the error of zero to 3 %."
)


class Arm(NamedTuple):
    """One run."""

    objective: str  # a label, exact, or cross-entropy
    temperature: float = 1.0
    seed: int = 0
    share: float = QUARTER
    layers: int = 20

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return f"{self.objective}_T{self.temperature:g}_{self.share:g}_{self.layers}_seed{self.seed}".replace(" ", "-")


def arms() -> Iterator[Arm]:
    """Yield the runs in the order of what they decide: a budget that ends early leaves the least important ones out."""
    yield from (Arm(objective, 2.0) for objective in AT_TWO)
    yield from (Arm(objective) for objective in ("cross-entropy", "exact", "standard"))
    yield from (Arm(objective, share=1.0) for objective in ("cross-entropy", "standard", "exact"))
    for seed in range(3):
        yield from (Arm(objective, 2.0, seed) for objective in AT_TWO)
        yield from (Arm(objective, seed=seed) for objective in ("cross-entropy", *AT_TWO, "rich", "lean", DRAWS))
    yield from (Arm(objective, layers=layers) for layers in (24, 16) for objective in ("exact", "standard"))
    yield Arm("top-64 renormalised", share=1.0)


def make_cache(folder: Path, data: Path, name: str) -> Path:
    """Make the cache of a label on a data file, or finish it, and return it.

    It has the file's order, and one shard, as the file itself has: seeds then give the same batches from both.
    """
    place = folder / "caches" / f"{name} {data.stem}".replace(" ", "-").replace(",", "")
    with claimed(folder / "claims" / place.name, wait=True):
        if not is_complete(place):
            how = {"max_seq_length": LENGTH, "shard_positions": 1 << 20, "prompt_loss": False, **LABELS[name]}
            how |= {"train_data": str(corpus.in_cache_order(data)), "output": place}
            precompute(PrecomputeSettings.model_validate({**SMOLLM2, **how}))
    return place


def bytes_per_position(folder: Path, data: Path, objective: str) -> float | None:
    """Return the size of a label and its text, without what does not grow with them; None if it is not stored."""
    if objective not in LABELS:
        return None
    info = describe(make_cache(folder, data, objective))
    return round(sum(info.bytes_by_array.values()) / info.positions, 1)


def train(folder: Path, data: Path, arm: Arm, kept: str, max_steps: int | None) -> Path:
    """Train the student of a run, or finish it, and return the run's folder."""
    run = folder / "runs" / arm.name
    if (run / ENDS_FILE).exists():
        return run
    source: dict[str, Any] = {"train_data": str(data), "max_seq_length": LENGTH}
    if arm.objective in LABELS:
        source = {"cache": str(make_cache(folder, data, arm.objective))}
        source |= {"tail": "renormalize"} if arm.objective == "top-64 renormalised" else {}
    loss: dict[str, Any] = {"distillation_type": "output"}
    if arm.objective != "cross-entropy":
        loss = {"distillation_type": "logit", "temperature": arm.temperature}
    resumed = {"resume_from_checkpoint": "latest"} if latest_checkpoint(run) else {}
    ends = {"eval_fraction": 0.0, "seed": arm.seed, "output_dir": run, "max_steps": max_steps}
    how = {**SMOLLM2, **TRAINING, "init_from_teacher_layers": kept, **source, **loss, **ends, **resumed}
    run_training(TrainSettings.model_validate(how))
    return run


def kept_layers() -> dict[int, str]:
    """Return the layers that are left, by their number, if others are removed as tests/benchmarks/pruning.py did."""
    order = json.loads(PRUNING.read_text())["ways"]["loss, shortlist of 4"]["order"]
    return {count: ",".join(str(layer) for layer in range(30) if layer not in order[: 30 - count]) for count in LAYERS}


def spent() -> Iterator[float]:
    """Yield the core-hours that this process and its children have computed since the value before."""
    before = 0.0
    while True:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        now = sum(each.ru_utime + each.ru_stime for each in used) / 3600
        yield now - before
        before = now


@contextlib.contextmanager
def claimed(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file, and say whether it is ours: what another process makes is left to it, or waited for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        ours = True
        try:
            lock_file(lock, wait=wait)
        except BlockingIOError:
            ours = False
        yield ours


@contextlib.contextmanager
def written(results: Path, folder: Path, hours: Iterator[float]) -> Iterator[dict[str, Any]]:
    """Lend the results, to one process at a time; add what it has computed to them, and write them."""
    with claimed(folder / "claims/results", wait=True):
        done = json.loads(results.read_text())
        done["core_hours"] = round(done["core_hours"] + next(hours), 3)
        yield done
        done["runs"] = {arm.name: done["runs"][arm.name] for arm in arms() if arm.name in done["runs"]}
        write_atomically(results, done)


def held_out(model: str, cache: Path, problems: int) -> dict[str, Any]:
    """Return a model's perplexity and KL on the held-out cache, its HumanEval score, and its answers."""
    shown: dict[str, Any] = {"model": model, "cache": str(cache), "device": "cpu"}
    if problems:
        shown |= {"humaneval": True, "allow_code_execution": True, "problems": problems, "max_new_tokens": 256}
    found: dict[str, Any] = json.loads(evaluate(EvaluateSettings.model_validate(shown)).model_dump_json())
    figures = {name: found["on_cache"][name] for name in FIGURES} | {"humaneval": found["humaneval"]}
    return figures | ({"answers": {prompt: answer(Path(model), prompt) for prompt in PROMPTS}} if problems else {})


def table(done: dict[str, Any]) -> str:
    """Return the runs as a Markdown table, in their order: held-out figures, KL with its standard error."""
    lines = ["| objective | T | data | layers | seed | perplexity | KL, T=1 | T=2 | agreement | calibration error |"]
    lines.append("|---" * 10 + "|")
    for run in done["runs"].values():
        arm, kl = Arm(**run["arm"]), {each["temperature"]: each for each in run["kl"]}
        cells = [arm.objective, f"{arm.temperature:g}", f"{arm.share:g}", str(arm.layers), str(arm.seed)]
        cells += [
            f"{run['perplexity']:.2f}",
            *(f"{kl[t]['kl']:.3f} ± {kl[t]['standard_error']:.3f}" for t in (1.0, 2.0)),
        ]
        cells += [f"{run['top1_agreement']:.3f}", f"{run['calibration_error']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def answered(done: dict[str, Any]) -> str:
    """Return HumanEval's scores and the answers as Markdown: of the teacher, and of the runs that have them."""
    runs = {"teacher": done["teacher"]}
    runs |= {f"{run['arm']['objective']}, {run['arm']['share']:g}": run for run in done["runs"].values()}
    models = {name: run for name, run in runs.items() if run.get("humaneval")}
    scores = ["| model | HumanEval pass@1 |", "|---" * 2 + "|"]
    for name, run in models.items():
        ((rate, error),) = ((each["rate"], each["standard_error"]) for each in run["humaneval"]["pass_rates"])
        scores.append(f"| {name} | {100 * rate:.1f} % ± {100 * error:.1f} |")
    lines = [f"| {' | '.join(('', *models))} |", "|---" * (1 + len(models)) + "|"]
    for prompt in PROMPTS:
        texts = [" ".join(run["answers"][prompt].replace("```", "").split()) for run in models.values()]
        cut = [text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}…" for text in texts]
        lines.append(f"| {' | '.join((prompt, *cut))} |")
    return "\n".join([*scores, "", *lines])


def begin(results: Path, data: str) -> None:
    """Write the prediction before there is anything to see. Raises SystemExit if there are runs on other data."""
    done: dict[str, Any] = {"predicted": PREDICTED, "core_hours": 0.0, "teacher": {}, "runs": {}, "data": data}
    done |= json.loads(results.read_text()) if results.exists() else {}
    if done["runs"] and done["data"] != data:
        raise SystemExit(f"{results} has runs on other data: move it away, and predict again")
    write_atomically(results, {**done, "machine": machine(), "data": data})


def main() -> None:
    """Make what is missing until the budget is used up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/healing"))
    parser.add_argument("--hours", type=float, default=14.0)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    results = given.folder / "healing.json" if given.small else RESULTS
    problems, max_steps, hours = 2 if given.small else 164, 2 if given.small else None, spent()
    with claimed(given.folder / "claims/data", wait=True):
        corpus.make(given.folder, teacher_path(), corpus.SMALL if given.small else corpus.WHOLE)
        data = corpus.digest(given.folder)
        begin(results, data)
        parts = {share: corpus.shorter(given.folder, share) for share in (QUARTER, 1.0)}
    judged = make_cache(given.folder, given.folder / "held-out.jsonl", "rich")
    kept = kept_layers()
    for arm in arms():
        with claimed(given.folder / "claims" / arm.name) as ours:
            with written(results, given.folder, hours) as done:
                used, open_ = done["core_hours"], ours and arm.name not in done["runs"]
            if open_ and used >= given.hours:
                print(f"{used:.1f} core-hours are used: {arm.name} and what follows are left out")
                break
            if not open_:
                continue
            own = spent()
            next(own)
            run = train(given.folder, parts[arm.share], arm, kept[arm.layers], max_steps)
            figures = held_out(str(run / "final"), judged, problems if arm.share == 1.0 else 0)
            with written(results, given.folder, hours) as done:
                size = bytes_per_position(given.folder, parts[arm.share], arm.objective)
                costs = {"core_hours": round(next(own), 3), "bytes_per_position": size}
                done["runs"][arm.name] = {"arm": arm._asdict(), **costs, **figures}
            print(arm.name, figures["perplexity"], figures["kl"], flush=True)
    with claimed(given.folder / "claims/teacher") as ours:
        if ours and not json.loads(results.read_text())["teacher"]:
            figures = held_out(teacher_path(), judged, problems)
            with written(results, given.folder, hours) as done:
                done["teacher"] = figures
    done = json.loads(results.read_text())
    print(table(done), answered(done), sep="\n\n")


if __name__ == "__main__":
    main()
