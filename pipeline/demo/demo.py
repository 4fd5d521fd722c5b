"""``logitcask demo``: a teacher loses a third of its layers, and the cache of its labels heals what is left.

Each step calls the function of a command and prints the line that a user would type for it. What is finished is kept:
run again, the demo continues where it was.
"""

import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.console import results, say
from logitcask.pipeline.demo.teacher import find_teacher
from logitcask.pipeline.evaluate.on_cache import evaluate_on_cache
from logitcask.pipeline.generate_data.generate import generate_data
from logitcask.pipeline.models.generate import answer_of
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.students.layers import keep_layers
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.runs.run_folder import ENDS_FILE, FINAL, SETTINGS_FILE, latest_checkpoint
from logitcask.pipeline.settings.base import Settings, flag_of
from logitcask.pipeline.settings.data import SplitSettings
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.generate import GenerateSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.split import split_data
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.train.train import run_training

PROMPT = '''Write a Python function that does what its docstring says.

def is_even(number):
    """Return whether a number is even."""'''


@dataclass(frozen=True)
class Sizes:
    """How much a demo does."""

    examples: int = 92
    test: int = 12
    length: int = 256  # tokens per example
    layers: int = 20
    batch: int = 2
    rate: float = 3e-4
    warmup: int = 4
    new_tokens: int = 60
    source: Path | None = None  # Python files; None: the standard library


@dataclass(frozen=True)
class Model:
    """A model of the demo: its figures on the held-out examples, and its answer to the prompt."""

    name: str
    perplexity: float
    kl: float  # to the teacher, nats per position
    answer: str


def run_demo(folder: Path, sizes: Sizes | None = None, teacher: Path | None = None) -> list[Model]:
    """Run the demo in a folder, or what is left of it, print its results and return them.

    Raises LogitcaskError if the teacher is not installed, or the folder holds something else.
    """
    sizes, teacher = sizes or Sizes(), teacher or find_teacher()
    began = time.monotonic()
    say(f"$ teacher={shlex.quote(_short(teacher))}")
    _data(folder, sizes)
    for part in ("test", "train"):
        _cache(folder, part, sizes, teacher)
    _train(folder / "healed", "auto:" + str(sizes.layers), "hybrid", sizes, folder, teacher)
    chosen = str(json.loads((folder / "healed" / FINAL / SETTINGS_FILE).read_text())["init_from_teacher_layers"])
    _train(folder / "text-alone", chosen, "output", sizes, folder, teacher)
    models = _models(folder, chosen, sizes, teacher)
    _show(models)
    say(f"done in {time.monotonic() - began:,.0f} s; {folder}/healed/{FINAL} is an ordinary transformers folder")
    return models


def _data(folder: Path, sizes: Sizes) -> None:
    _title("1  text: documented functions of the Python standard library, some of them held out")
    everything = GenerateDataSettings.model_validate(
        {"output_dir": folder / "all", "num_examples": sizes.examples}
        | ({"source_dir": sizes.source} if sizes.source else {})
    )
    _step("generate-data", everything, folder / "all/train.jsonl", lambda: say(str(generate_data(everything))))
    split = SplitSettings(data=(str(folder / "all/train.jsonl"),), test=sizes.test, output_dir=folder / "data")
    reading = Reading(split.data, **split.taken)
    _step("split", split, folder / "data/test.jsonl",
          lambda: _say_split(split_data(reading, split.output_dir, split.test, split.seed)))  # fmt: skip


def _say_split(done: Any) -> None:
    say(f"{done.train_examples:,} examples -> {done.train}, {done.test_examples:,} -> {done.test}")


def _cache(folder: Path, part: str, sizes: Sizes, teacher: Path) -> None:
    if part == "test":
        _title("2  stage 1: the teacher labels each example once")
    settings = PrecomputeSettings.model_validate(
        {
            "teacher_model": str(teacher),
            "train_data": str(folder / f"data/{part}.jsonl"),
            "output": folder / ("cache" if part == "train" else "test-cache"),
            "max_seq_length": sizes.length,
        }
    )
    _type("precompute-logits", settings, teacher)
    report = precompute(settings)
    data = report.manifest.data
    say(f"{data.examples:,} examples, {data.positions:,} target positions -> {settings.output}")


def _train(run: Path, layers: str, kind: str, sizes: Sizes, folder: Path, teacher: Path) -> None:
    if kind == "hybrid":
        _title("3  stage 2: a student of the teacher's layers, some left out, is healed from the cache")
    else:
        _title("4  the same student on the same steps, from the text alone")
    settings = TrainSettings.model_validate(
        {
            "cache": str(folder / "cache"),
            "init_from_teacher_layers": layers,
            "teacher_model": str(teacher),
            "output_dir": run,
            "batch_size": sizes.batch,
            "learning_rate": sizes.rate,
            "warmup_steps": sizes.warmup,
            "eval_fraction": 0.0,
            **({} if kind == "hybrid" else {"distillation_type": kind}),
        }
    )
    latest = latest_checkpoint(run)
    if latest is not None and not (run / ENDS_FILE).exists():
        settings = settings.model_copy(update={"resume_from_checkpoint": "latest"})
    _step("train", settings, run / ENDS_FILE, lambda: run_training(settings), teacher)
    for checkpoint in run.glob("checkpoint-*"):  # a gigabyte each
        shutil.rmtree(checkpoint)


def _models(folder: Path, chosen: str, sizes: Sizes, teacher: Path) -> list[Model]:
    """Return the teacher, the student before and after, and the one trained on the text alone."""
    _title("5  held out, and one prompt")
    reader, tokenizer = CacheReader(folder / "test-cache"), load_tokenizer(str(teacher))
    models = list[Model]()

    def add(name: str, model: PreTrainedModel) -> float:
        """Add a model, and return the teacher's perplexity."""
        figures = evaluate_on_cache(model.eval(), reader, None, sizes.batch)
        answer = answer_of(model, tokenizer, PROMPT, sizes.new_tokens)
        models.append(Model(name, figures.perplexity, figures.kl[0].kl, answer))
        return figures.teacher_perplexity

    whole = load_causal_lm(str(teacher), dtype=torch.float32)
    perplexity = add(f"{sizes.layers} of its layers", keep_layers(whole, chosen))
    answer = answer_of(whole, tokenizer, PROMPT, sizes.new_tokens)
    models.insert(0, Model(f"teacher, {whole.config.num_hidden_layers} layers", perplexity, 0.0, answer))
    for name, run in (("healed from the cache", "healed"), ("trained on the text alone", "text-alone")):
        final = str(folder / run / FINAL)
        _type("evaluate", EvaluateSettings(model=final, cache=str(folder / "test-cache")))
        _type("generate", GenerateSettings(model=final, prompt="…", max_new_tokens=sizes.new_tokens))
        add(name, load_causal_lm(final, dtype=torch.float32))
    return models


def _show(models: list[Model]) -> None:
    """Print the table of the models, then their answers."""
    width = max(len(model.name) for model in models)
    lines = [f"{'held out':<{width}}  perplexity  KL to the teacher, nats"]
    lines += [f"{model.name:<{width}}  {model.perplexity:>10,.2f}  {model.kl:>23.2f}" for model in models]
    lines += ["", "prompt", *_indented(PROMPT)]
    for model in models:
        lines += ["", model.name, *_indented(model.answer)]
    results().print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.splitlines()]


def _step(name: str, settings: Settings, made: Path, work: Callable[[], Any], teacher: Path | None = None) -> None:
    """Print a command and do its work, unless what it makes is there."""
    _type(name, settings, teacher)
    if made.exists():
        say(f"{made} is there: kept")
        return
    work()


def _type(name: str, settings: Settings, teacher: Path | None = None) -> None:
    """Print the line that a user would type."""
    words = ["logitcask", name]
    given: Mapping[str, Any] = settings.model_dump(mode="json", exclude_defaults=True)
    for option, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            word = '"$teacher"' if teacher is not None and each == str(teacher) else shlex.quote(str(each))
            words += [flag_of(option), word]
    say(f"$ {' '.join(words)}")


def _title(text: str) -> None:
    say(f"\n== {text}")


def _short(path: Path) -> str:
    """Return a path as seen from the current folder if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
