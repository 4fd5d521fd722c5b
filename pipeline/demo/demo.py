"""``logitcask demo``: a teacher loses a third of its layers, and a cache of its labels heals what is left.

Each step calls the function of a command and prints the line that a user would type for it. What is finished is kept:
run again, the demo continues where it was.
"""

import json
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.console import duration, notices, print_line, results, say
from logitcask.pipeline.demo.teacher import find_teacher
from logitcask.pipeline.evaluate.on_cache import evaluate_on_cache
from logitcask.pipeline.generate_data.generate import generate_data
from logitcask.pipeline.gguf import parsed_once
from logitcask.pipeline.models.generate import answer_of
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.students.layers import keep_layers
from logitcask.pipeline.precompute.report import result_line
from logitcask.pipeline.runs.run_folder import ENDS_FILE, FINAL, SETTINGS_FILE, latest_checkpoint
from logitcask.pipeline.settings.base import S, flag_of
from logitcask.pipeline.settings.data import SplitSettings
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.generate import GenerateSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.split import split_data
from logitcask.pipeline.text.tokenizer import load_tokenizer

HEALED, TEXT_ALONE = "healed", "text-alone"
PROMPT = '''Write a Python function that does what its docstring says.

def is_even(number):
    """Return whether a number is even."""'''


@dataclass(frozen=True)
class Sizes:
    """How much a demo does."""

    examples: int = 80
    test: int = 12
    length: int = 256  # tokens per example
    layers: int = 20
    batch: int = 2
    rate: float = 3e-4
    alpha: float = 0.5  # weight of the text beside the soft labels
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


@parsed_once()
def run_demo(folder: Path, sizes: Sizes | None = None, teacher: Path | None = None) -> list[Model]:
    """Run the demo in a folder, or what is left of it, print its results and return them.

    Raises LogitcaskError if the teacher is not installed, or the folder holds something else.
    """
    sizes, teacher = sizes or Sizes(), teacher or find_teacher()
    began = time.monotonic()
    print_line(notices(), f"$ teacher={shlex.quote(str(_from_here(teacher)))}")
    _write_data(folder, sizes)
    _title("stage 1: the teacher labels each example once")
    _label(folder / "data/test.jsonl", folder / "test-cache", sizes, teacher)
    _label(folder / "data/train.jsonl", folder / "cache", sizes, teacher)
    _title("stage 2: a student of some of the teacher's layers is healed from the cache")
    _train(folder, HEALED, f"auto:{sizes.layers}", sizes, teacher, alpha=sizes.alpha)
    chosen = json.loads((folder / HEALED / FINAL / SETTINGS_FILE).read_text())["init_from_teacher_layers"]
    _title("the same student on the same steps, from the text alone")
    _train(folder, TEXT_ALONE, chosen, sizes, teacher, distillation_type="output")
    _title("held-out examples, and one prompt")
    models = _models(folder, chosen, sizes, teacher)
    _show(models)
    say(
        f"in {duration(time.monotonic() - began)}; {folder / HEALED / FINAL} is an ordinary transformers folder", "done"
    )
    return models


def _write_data(folder: Path, sizes: Sizes) -> None:
    _title("text: documented Python functions, some of them held out")
    source = {"source_dir": sizes.source} if sizes.source else {}
    every = _typed(
        "generate-data", GenerateDataSettings, output_dir=folder / "all", num_examples=sizes.examples, **source
    )
    if not _kept(folder / "all/train.jsonl"):
        say(generate_data(every), "data")
    written = str(folder / "all/train.jsonl")
    split = _typed("split", SplitSettings, data=written, output_dir=folder / "data", test=sizes.test)
    if not _kept(folder / "data/test.jsonl"):
        done = split_data(Reading(split.data, **split.taken), split.output_dir, split.test, split.seed)
        say(f"{done.train_examples:,} examples -> {done.train}, {done.test_examples:,} -> {done.test}", "data")


def _label(data: Path, output: Path, sizes: Sizes, teacher: Path) -> None:
    # a stage is imported when it runs, as by its command
    from logitcask.pipeline.precompute.precompute import precompute

    settings = _typed(
        "precompute-logits",
        PrecomputeSettings,
        teacher_model=str(teacher),
        train_data=str(data),
        output=output,
        max_seq_length=sizes.length,
    )
    say(*reversed(result_line(settings, precompute(settings))))


def _train(folder: Path, name: str, layers: str, sizes: Sizes, teacher: Path, **others: Any) -> None:
    from logitcask.pipeline.train.train import run_training

    run = folder / name
    unfinished = latest_checkpoint(run) is not None and not (run / ENDS_FILE).exists()
    settings = _typed(
        "train",
        TrainSettings,
        cache=str(folder / "cache"),
        init_from_teacher_layers=layers,
        teacher_model=str(teacher),
        output_dir=run,
        batch_size=sizes.batch,
        learning_rate=sizes.rate,
        warmup_steps=sizes.warmup,
        eval_fraction=0,
        **others,
        **({"resume_from_checkpoint": "latest"} if unfinished else {}),
    )
    if not _kept(run / ENDS_FILE):
        run_training(settings)
    for checkpoint in run.glob("checkpoint-*"):  # a gigabyte each
        shutil.rmtree(checkpoint)


def _models(folder: Path, chosen: str, sizes: Sizes, teacher: Path) -> list[Model]:
    """Return the teacher, the student before and after, and the one trained on the text alone."""
    cache, tokenizer = str(folder / "test-cache"), load_tokenizer(str(teacher))
    reader, models = CacheReader(cache), list[Model]()

    def add(name: str, model: PreTrainedModel) -> float:
        """Add a model, and return the teacher's perplexity."""
        figures = evaluate_on_cache(model.eval(), reader, None, sizes.batch)
        answer = answer_of(model, tokenizer, PROMPT, sizes.new_tokens)
        models.append(Model(name, figures.perplexity, figures.kl[0].kl, answer))
        assert figures.teacher_perplexity is not None  # stage 1 measures it
        return figures.teacher_perplexity

    whole = load_causal_lm(str(teacher), dtype=torch.float32)
    perplexity = add(f"{sizes.layers} of its layers", keep_layers(whole, chosen))
    answer = answer_of(whole, tokenizer, PROMPT, sizes.new_tokens)
    models.insert(0, Model(f"teacher, {whole.config.num_hidden_layers} layers", perplexity, 0.0, answer))
    for run, name in ((HEALED, "healed from the cache"), (TEXT_ALONE, "trained on the text alone")):
        final = str(folder / run / FINAL)
        _typed("evaluate", EvaluateSettings, model=final, cache=cache)
        _typed("generate", GenerateSettings, model=final, prompt="…", max_new_tokens=sizes.new_tokens)
        add(name, load_causal_lm(final, dtype=torch.float32))
    return models


def _show(models: list[Model]) -> None:
    """Print the table of the models, then their answers."""
    width = max(len(model.name) for model in models)
    print_line(results(), f"{'held out':<{width}}  perplexity  KL to the teacher, nats")
    for model in models:
        print_line(results(), f"{model.name:<{width}}  {model.perplexity:>10,.2f}  {model.kl:>23.2f}")
    for title, text in (("prompt", PROMPT), *((model.name, model.answer) for model in models)):
        print_line(results(), f"\n{title}")
        for line in (text or "(nothing)").splitlines():
            print_line(results(), f"    {line}".rstrip())


def _typed(name: str, kind: type[S], /, **values: Any) -> S:
    """Print the line that a user would type, and return its settings."""
    words = ["logitcask", name]
    for option, value in values.items():
        of_teacher = option == "teacher_model"
        words += [flag_of(option), '"$teacher"' if of_teacher else shlex.quote(str(value))]
    print_line(notices(), f"$ {' '.join(words)}")
    return kind.model_validate(values)


def _kept(made: Path) -> bool:
    """Return whether what a command makes is there already, and say so."""
    if made.exists():
        say(f"{made} is there already", "kept")
    return made.exists()


def _title(text: str) -> None:
    print_line(notices(), f"\n== {text}")


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
