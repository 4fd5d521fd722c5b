"""Whether a round of on-policy distillation helps at equal tokens, with the study's second teacher.

Run as ``python -m tests.benchmarks.rounds [FOLDER [MINUTES]]`` (half an hour on one core; it begins nothing after so
many minutes of processor time, and the same command resumes it). A student of each seed learns from a cache of code,
then goes on for half as many steps in each of the ways of ``WAYS``, from the same weights and with the same schedule:
on the first cache alone; on that and text that it wrote itself, half and half, as ``just rounds`` does; on that and new
code, which costs the teacher as much. Held-out code shows whether it is a better student, text that each student then
writes whether it is nearer its teacher there; both write as ``generate-data`` lets them, from the 50 most probable
tokens. ``results/rounds.json`` has what was predicted before the first run.

Legend: W windows of L tokens, V vocabulary. Divergences are in nats per position, over the whole vocabulary at T=1.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logitcask.cache.labels import IntArray
from logitcask.pipeline.generate_data.local_model import answer_locally
from logitcask.pipeline.generate_data.prompts import Prompt
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.runs.run_folder import FINAL, latest_checkpoint
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from tests.benchmarks.study import second
from tests.benchmarks.study.corpus import LENGTH, code_files, windows
from tests.benchmarks.study.report import interval, machine
from tests.benchmarks.study.students import CONFIG, write_atomically
from tests.benchmarks.study.summary import found, row

RESULTS = Path(__file__).parent / "results/rounds.json"
SEEDS, BATCH, STEPS = (0, 1, 2), 4, 150  # the first cache is read once
MORE = STEPS // 2
PROMPT, OWN = 32, MORE * BATCH // 2  # tokens of a prompt; texts of a round, each read once
HELD_OUT = 64  # windows, and as many prompts of others
REVERSE = {"tail": "bucket", "divergence": "reverse-kl"}
NOTHING: tuple[str | None, dict[str, str]] = (None, {})
WAYS = {  # what is mixed with the first cache, and the loss
    "first cache": NOTHING,
    "own text": ("own", {}),
    "new code": ("new", {}),
    "first cache, reverse KL": (None, REVERSE),
    "own text, reverse KL": ("own", REVERSE),
}
FIGURES = {
    "held_out_kl": "held out: KL",
    "perplexity": "perplexity",
    "own_kl": "own text: KL",
    "own_reverse_kl": "reverse KL",
    "own_teacher_loss": "teacher's own loss",
}
PREDICTED = (
    "Held out, after a round: new code is best, the first cache alone 0.01 nats of KL behind it, own text 0.03 behind "
    "(the teacher says little about code there): at equal tokens a round does not help on held-out code. On text of "
    "their own: the student of own text is 0.03 to 0.1 nats of KL nearer its teacher than that of the first cache, "
    "the only figure where a round wins. Reverse KL costs 0.05 nats or more of held-out KL and is best in reverse KL "
    "on own text, most with own text."
)


def make_teacher(folder: Path) -> Path:
    """Train the study's second teacher, if it is not there, and return it with an end token, which no text has."""
    place = folder / "teacher"
    if not (place / "config.json").exists():
        model, tokenizer = second.load(folder / "second")
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokenizer.encode("\0"))[0]
        tokenizer.save_pretrained(place)
        model.save_pretrained(place)
    return place


def make_cache(folder: Path, teacher: Path, rows: Iterable[tuple[list[int], int]]) -> Path:
    """Label rows, each token ids and how many of them are no targets, or finish that, and return the cache."""
    data = folder / "train.jsonl"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        records = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in rows]
        data.with_suffix(".part").write_text("".join(json.dumps(record) + "\n" for record in records))
        data.with_suffix(".part").rename(data)
    settings = {
        "teacher_model": str(teacher),
        "train_data": str(data),
        "output": folder / "cache",
        "max_seq_length": 2 * LENGTH,
        "device": "cpu",
    }
    precompute(PrecomputeSettings.model_validate(settings))
    return folder / "cache"


def written(
    student: Path, tokenizer: PreTrainedTokenizerBase, prompts: IntArray, seed: int
) -> Iterator[tuple[list[int], int]]:
    """Return rows of prompts and what a student writes, as ``generate-data --provider local`` lets it."""
    asked = [Prompt(str(i), tokenizer.decode(ids), "code", "python") for i, ids in enumerate(prompts)]
    replies = answer_locally(
        str(student),
        asked,
        batch_size=50,
        max_new_tokens=LENGTH + PROMPT,
        temperature=1.0,
        dtype="float32",
        device="cpu",
        seed=seed,
    )
    for batch in replies:
        for prompt, reply in batch:
            before = tokenizer.encode(prompt.text)
            yield before + tokenizer.encode(reply.text)[: LENGTH - 1], len(before)


def train(run: Path, seed: int, steps: int, **options: Any) -> Path:
    """Train a student from labels alone, or finish it, and return it."""
    if not (run / FINAL / "config.json").exists():
        settings = {
            "output_dir": run,
            "distillation_type": "logit",
            "batch_size": BATCH,
            "max_steps": steps,
            "seed": seed,
            "eval_fraction": 0,
            "save_steps": 50,
            "save_total_limit": 1,
            "logging_steps": 50,
            "device": "cpu",
            "resume_from_checkpoint": "latest" if latest_checkpoint(run) else None,
        }
        run_training(TrainSettings.model_validate(settings | options))
    return run / FINAL


@torch.inference_mode()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, ids_WL: Tensor, first: int) -> tuple[float, ...]:
    """Return means over the tokens from ``first`` on: KL, reverse KL, loss of the student and of the teacher."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for ids in torch.split(ids_WL, 8):
        gold = ids[:, first:, None]
        log_q, log_p = (
            functional.log_softmax(model(ids).logits[:, first - 1 : -1].float(), dim=-1) for model in (student, teacher)
        )
        gap = log_p - log_q
        parts = (log_p.exp() * gap, -log_q.exp() * gap, -log_q.gather(2, gold), -log_p.gather(2, gold))
        sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])
        count += gold.numel()
    return tuple((sums / count).tolist())


@torch.inference_mode()
def evaluate(place: Path, teacher: PreTrainedModel, held_out: IntArray, prompts: IntArray) -> dict[str, float]:
    """Return a student's figures on held-out code and on what it writes, token by token, to held-out prompts."""
    student = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    kl, _, loss, _ = compare(student, teacher, torch.from_numpy(held_out), 1)
    set_seed(0)
    own = student.generate(
        torch.from_numpy(prompts), do_sample=True, temperature=1.0, min_new_tokens=LENGTH - PROMPT,
        max_new_tokens=LENGTH - PROMPT, pad_token_id=0,
    )  # fmt: skip
    own_kl, own_reverse, _, teachers = compare(student, teacher, own, PROMPT)
    figures = (kl, float(torch.tensor(loss).exp()), own_kl, own_reverse, teachers)
    return dict(zip(FIGURES, figures, strict=True))


def more(here: Path, way: str, seed: int, first: Path, beside: Path | None) -> Path:
    """Train the student of a seed further in one of ``WAYS``, or finish it, and return it."""
    cache = [str(first)] if beside is None else [f"{first}:0.5", f"{beside}:0.5"]
    options = {"cache": cache, "student_model": str(here / "before" / FINAL), "learning_rate": 1e-3}
    return train(here / file_name(way), seed + 100, MORE, **options, warmup_steps=10, **WAYS[way][1])


def file_name(way: str) -> str:
    """Return the name of a way's files."""
    return way.replace(",", "").replace(" ", "-")


def rounds(folder: Path, until: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of all students; what is missing is run until it is time to stop."""
    place = make_teacher(folder)
    teacher, tokenizer = second.load(folder / "second")
    code = windows(code_files(held_out=False), tokenizer, STEPS * BATCH + 2 * OWN)
    first, new, asked = code[: STEPS * BATCH], code[STEPS * BATCH : -OWN], code[-OWN:, :PROMPT]
    held = windows(code_files(held_out=True), tokenizer, 2 * HELD_OUT)
    rows = {name: ((ids, 0) for ids in part.tolist()) for name, part in (("first", first), ("new", new))}
    caches = {name: make_cache(folder / name, place, part) for name, part in rows.items()}
    config = folder / "student.json"
    config.write_text(json.dumps(CONFIG))
    plain = [("before", *(way for way in WAYS if not WAYS[way][1])), [way for way in WAYS if WAYS[way][1]]]
    for seed, way in [(seed, way) for ways in plain for seed in SEEDS for way in ways]:
        here = folder / f"seed-{seed}"
        figures = here / f"{file_name(way)}.json"
        if not figures.exists():
            if time.process_time() > until:
                print("out of time: the same command resumes it", flush=True)
                return
            before = here / "before"
            if way == "before":
                options = {"cache": str(caches["first"]), "student_config": config, "learning_rate": 2e-3}
                student = train(before, seed, STEPS, **options)
            else:
                beside = WAYS[way][0]
                if beside == "own":
                    caches["own"] = make_cache(here / "own", place, written(before / FINAL, tokenizer, asked, seed))
                student = more(here, way, seed, caches["first"], caches.get(beside) if beside else None)
            write_atomically(
                figures, {"seed": seed, "way": way, **evaluate(student, teacher, held[::2], held[1::2, :PROMPT])}
            )
        yield json.loads(figures.read_text())


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the figures in Markdown: means over seeds; of what is mixed in, differences to the first cache alone."""
    of = {(run["way"], run["seed"]): run for run in runs}
    lines = [row(["trained further on", *FIGURES.values()]), "|" + "---|" * (len(FIGURES) + 1)]
    for way, (beside, loss) in {"before": NOTHING, **WAYS}.items():
        base = next((other for other, how in WAYS.items() if how == (None, loss)), way) if beside else None
        seeds = [seed for seed in SEEDS if {(way, seed), (base or way, seed)} <= of.keys()]
        values = [[of[way, s][name] - (of[base, s][name] if base else 0) for s in seeds] for name in FIGURES]
        if seeds:
            lines.append(row([way, *(found(interval(each), "+" if base else "") for each in values)]))
    return lines


def main() -> None:
    """Run what is missing, write the figures and print their table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/rounds")
    until = 60 * (float(sys.argv[2]) if len(sys.argv) > 2 else 1e6)
    if not RESULTS.exists():  # the prediction is written before there is anything to see
        write_atomically(RESULTS, {"machine": machine(), "predicted": PREDICTED})
    runs = list(rounds(folder, until))
    write_atomically(RESULTS, {"machine": machine(), "predicted": PREDICTED, "runs": runs})
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
