"""``logitcask evaluate``: a student against a cache (text and teacher), HumanEval, tasks of lm-evaluation-harness."""

from pathlib import Path

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
    """Evaluate a model on what the settings name, and write the figures to ``--output`` if it is given.

    Raises LogitcaskError if model and cache do not match, one of them or a package is missing, or memory runs out.
    """
    with explain_out_of_memory(f"lower --batch-size from {settings.batch_size}, or take a smaller model"):
        return _evaluate(settings)


def _evaluate(settings: EvaluateSettings) -> Evaluation:
    if settings.output is not None and not settings.output.parent.is_dir():
        raise LogitcaskError(
            f"--output {settings.output}: there is no folder {settings.output.parent}: create it first"
        )
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
    evaluation = Evaluation(
        model=settings.model,
        on_cache=None
        if reader is None
        else evaluate_on_cache(
            model, reader, settings.limit, settings.batch_size, settings.where, settings.temperatures
        ),
        humaneval=None
        if problems is None
        else humaneval(
            model,
            tokenizer,
            problems,
            samples=settings.samples,
            ks=settings.k,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=settings.seed,
        ),
        tasks=[] if tasks is None else tasks.run(model, tokenizer, settings.limit, settings.batch_size),
    )
    if settings.output is not None:
        settings.output.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return evaluation


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures as a table on stdout."""
    on_cache = evaluation.on_cache
    size = f"{on_cache.examples:,} examples, {on_cache.positions:,} positions" if on_cache else ""
    table = Table(f"{Path(evaluation.model)}", size)
    for name, value in rows(evaluation).items():
        table.add_row(name, value)
    results().print(table)
