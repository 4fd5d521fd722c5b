"""``logitcask evaluate``: a student against a cache (text and teacher), HumanEval, tasks of lm-evaluation-harness."""

import os
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.console import results, say
from logitcask.pipeline.evaluate.humaneval import humaneval, load_problems
from logitcask.pipeline.evaluate.lm_eval import Tasks
from logitcask.pipeline.evaluate.on_cache import evaluate_on_cache
from logitcask.pipeline.evaluate.sandbox import require_sandbox
from logitcask.pipeline.machine import choose_device, explain_out_of_memory
from logitcask.pipeline.models.load import load_causal_lm, require_finite
from logitcask.pipeline.runs.evaluation import Evaluation, rows
from logitcask.pipeline.runs.run_folder import source_of
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.text.tokenizer import load_tokenizer, require_tokenizer
from logitcask.pipeline.train.sources.cache import cache_identity


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Evaluate a model on what the settings name; write each part of the figures to ``--output``, if it is given.

    Raises LogitcaskError if model and cache do not match, one of them or a package is missing, or memory runs out.
    """
    with explain_out_of_memory(f"lower --batch-size from {settings.batch_size}, or take a smaller model"):
        return _evaluate(settings)


def _evaluate(settings: EvaluateSettings) -> Evaluation:
    if (output := settings.output) is not None:
        if not output.parent.is_dir():
            raise LogitcaskError(f"--output {output}: there is no folder {output.parent}: create it first")
        if output.is_dir() or not os.access(output if _is_device(output) else output.resolve().parent, os.W_OK):
            raise LogitcaskError(f"--output {output}: cannot be written: choose another file")
    reader = None if settings.cache is None else CacheReader(settings.cache)
    if reader is not None:
        require_tokenizer(settings.model, reader.manifest.tokenizer.fingerprint, reader.path)
        if cache_identity(reader) in (source_of(Path(settings.model)) or ""):
            say(f"{reader.path}: {settings.model} was trained on it: only other examples show what it has learnt")
    problems = load_problems(settings.problems) if settings.humaneval else None
    if problems is not None:
        require_sandbox()
    tasks = None if settings.tasks is None else Tasks(settings.tasks)
    tokenizer = load_tokenizer(settings.model)
    model = load_causal_lm(settings.model, dtype=torch.float32).to(choose_device(settings.device)).eval()
    require_finite(model, settings.model)
    evaluation = Evaluation(model=settings.model, on_cache=None, humaneval=None, tasks=[])
    if reader is not None:
        on_cache = evaluate_on_cache(
            model, reader, settings.limit, settings.batch_size, settings.where, settings.temperatures
        )
        evaluation = _kept(output, evaluation, on_cache=on_cache)
    if problems is not None:
        scores = humaneval(
            model,
            tokenizer,
            problems,
            samples=settings.samples,
            ks=settings.k,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        evaluation = _kept(output, evaluation, humaneval=scores)
    if tasks is not None:
        evaluation = _kept(output, evaluation, tasks=tasks.run(model, tokenizer, settings.limit, settings.batch_size))
    return evaluation


def _kept(output: Path | None, evaluation: Evaluation, **part: Any) -> Evaluation:
    """Add a part to an evaluation, and write that: hours of HumanEval are not lost if a task fails after them."""
    evaluation = evaluation.model_copy(update=part)
    if output is not None:
        file = output.resolve()  # what a link refers to is written
        partial = file if _is_device(file) else file.with_name(f".{file.name}.partial")
        try:
            partial.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            say(evaluation.model_dump_json(), "figures")
            raise LogitcaskError(
                f"--output {output}: cannot be written: {error.strerror}: choose another file"
            ) from error
    return evaluation


def _is_device(file: Path) -> bool:
    """Return whether this is a device or a pipe, such as /dev/stdout: a file must not take its place."""
    return file.exists() and not file.is_file() and not file.is_dir()


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures as a table on stdout."""
    on_cache = evaluation.on_cache
    size = f"{on_cache.examples:,} examples, {on_cache.positions:,} positions" if on_cache else ""
    table = Table(f"{Path(evaluation.model)}", size)
    for name, value in rows(evaluation).items():
        table.add_row(name, value)
    results().print(table)
