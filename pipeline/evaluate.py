"""A student against a cache (text and teacher), HumanEval's tests, and tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.shard import Example
from logitcask.cache.soft_labels import soft_labels
from logitcask.cache.targets import SparseTargets
from logitcask.pipeline.batches import Collator, TrainingExample
from logitcask.pipeline.devices import choose_device
from logitcask.pipeline.evaluate_settings import EvaluateSettings
from logitcask.pipeline.evaluation import Divergence, Evaluation, OnCache, rows
from logitcask.pipeline.examples import Encoded
from logitcask.pipeline.fused import SLICE_LOGITS
from logitcask.pipeline.guards import require_finite
from logitcask.pipeline.harness import Tasks
from logitcask.pipeline.humaneval import humaneval, load_problems
from logitcask.pipeline.lm_head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.losses import SparseLabels
from logitcask.pipeline.measures import BINS, Array, ClusterSums, calibration_bins, calibration_error, measure
from logitcask.pipeline.memory import memory_explained
from logitcask.pipeline.models import load_causal_lm
from logitcask.pipeline.progress import track
from logitcask.pipeline.sandbox import require_sandbox
from logitcask.pipeline.sources import require_tokenizer
from logitcask.pipeline.student import require_room
from logitcask.pipeline.terminal import results
from logitcask.pipeline.tokenizer import load_tokenizer


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Evaluate a model on what the settings ask for, and write the figures where they are wanted.

    Raises LogitcaskError where model and cache do not fit, one of them or a package cannot be had, or memory runs out.
    """
    with memory_explained(f"lower --batch-size from {settings.batch_size}, or take a smaller model"):
        return _evaluate(settings)


def _evaluate(settings: EvaluateSettings) -> Evaluation:
    if settings.output is not None and not settings.output.parent.is_dir():
        raise LogitcaskError(f"--output {settings.output}: there is no folder {settings.output.parent}: make it first")
    reader = None if settings.cache is None else CacheReader(settings.cache)
    if reader is not None:
        require_tokenizer(settings.model, reader.manifest.tokenizer.fingerprint, reader.path)
    problems = load_problems(settings.problems) if settings.humaneval else None
    if problems is not None:
        require_sandbox()
    tasks = None if settings.tasks is None else Tasks(settings.tasks)
    tokenizer = load_tokenizer(settings.model)
    model = load_causal_lm(settings.model, dtype=torch.float32).to(choose_device(settings.device)).eval()
    require_finite(model, settings.model)
    found = Evaluation(
        model=settings.model,
        on_cache=None if reader is None else evaluate_on_cache(model, reader, settings.limit, settings.batch_size),
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
        settings.output.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return found


def evaluate_on_cache(model: PreTrainedModel, reader: CacheReader, limit: int | None, batch_size: int) -> OnCache:
    """Evaluate a model on the first examples of a cache, in its order. Raises LogitcaskError where they do not fit."""
    label = reader.manifest.label
    require_room(model, label.vocab_size, reader.manifest.data.longest)
    head = read_head(model)
    totals = _Totals(label)
    count = min(len(reader), limit or len(reader))
    collator = Collator(0, (), 1.0, "sampled")
    with track("evaluating", count, "examples") as advance, torch.inference_mode():
        for first in range(0, count, batch_size):
            examples = [reader.example(i) for i in range(first, min(first + batch_size, count))]
            batch = collator([TrainingExample(Encoded(e.input_ids, e.target_mask), None) for e in examples])
            hidden = last_hidden_states(model, batch["input_ids"].to(model.device)).flatten(0, 1)
            totals.add(examples, hidden[batch["target_index"].to(model.device)], head, batch["gold"])
            advance(len(examples))
    return totals.on_cache(str(reader.path))


class _Totals:
    """Sums over the examples so far."""

    def __init__(self, label: LabelSettings) -> None:
        self._label = label
        exact = label.head_size >= label.vocab_size
        self._tail = "sampled" if label.tail_draws or exact else "bucket"
        self._estimate = "exact" if exact else {"sampled": "unbiased", "bucket": "lower bound"}[self._tail]
        self._sums = ClusterSums(3 + len(label.temperatures))  # positions, hard loss, teacher's hard loss, KLs
        self._bins, self._teacher_bins = np.zeros((BINS, 2)), np.zeros((BINS, 2))
        self._agreed = self._examples = self._positions = 0

    def add(self, examples: Sequence[Example], hidden_NH: torch.Tensor, head: LMHead, gold_N: torch.Tensor) -> None:
        """Add examples, whose N target positions end to end have these hidden states and next tokens."""
        targets = SparseTargets.concatenate([example.targets for example in examples])
        at_once = max(1, SLICE_LOGITS // len(head.weight))
        columns = np.concatenate(
            [
                self._add_slice(targets[part], hidden_NH[part], head, gold_N[part])
                for part in (slice(i, i + at_once) for i in range(0, len(targets), at_once))
            ]
        )
        starts = np.cumsum([0, *(len(example.targets) for example in examples[:-1])])
        self._sums.add(np.add.reduceat(columns, starts, axis=0))
        self._examples += len(examples)
        self._positions += len(targets)

    def _add_slice(self, targets: SparseTargets, hidden_nH: torch.Tensor, head: LMHead, gold_n: torch.Tensor) -> Array:
        """Columns of the sums, (n, C), of rows whose logits fit in memory."""
        temperatures = self._label.temperatures
        labels = [(t, self._entries(targets, t, hidden_nH.device)) for t in temperatures]
        found = measure(head.logits(hidden_nH), gold_n.to(hidden_nH.device), labels, self._tail)
        top, gold = found.top_n.cpu().numpy(), gold_n.numpy()
        self._bins += calibration_bins(found.confidence_n.cpu().double().numpy(), top == gold)
        if self._label.head_size:
            first = targets.head_ids[:, 0]
            self._agreed += int((top == first).sum())
            self._teacher_bins += calibration_bins(_teacher_confidence(targets, temperatures), first == gold)
        each = [np.ones(len(gold)), found.hard_n.cpu().double().numpy(), -targets.gold_logprobs.astype(np.float64)]
        return np.concatenate([np.stack(each, axis=1), found.kl_nJ.cpu().double().numpy()], axis=1)

    def _entries(self, targets: SparseTargets, temperature: float, device: torch.device) -> SparseLabels:
        soft = soft_labels(targets, self._label.temperatures, temperature, self._tail)
        ids, weights, log_probs, log_rest = (
            torch.from_numpy(x).to(device) for x in (soft.ids, soft.weights, soft.log_probs, soft.log_rest)
        )
        return SparseLabels(ids, weights, log_probs, log_rest, soft.head_size)

    def on_cache(self, cache: str) -> OnCache:
        """The figures of everything added."""
        hard, error = self._sums.mean(1)
        kl = [(t, *self._sums.mean(3 + j)) for j, t in enumerate(self._label.temperatures)]
        headed = self._label.head_size > 0
        with np.errstate(over="ignore"):
            perplexity, of_teacher = float(np.exp(hard)), float(np.exp(self._sums.mean(2)[0]))
        return OnCache(
            cache=cache,
            examples=self._examples,
            positions=self._positions,
            perplexity=perplexity,
            hard_loss=hard,
            hard_loss_standard_error=error,
            kl_estimate=self._estimate,
            kl=[Divergence(temperature=t, kl=value, standard_error=spread) for t, value, spread in kl],
            top1_agreement=self._agreed / self._positions if headed else None,
            calibration_error=calibration_error(self._bins, self._positions),
            teacher_perplexity=of_teacher,
            teacher_calibration_error=calibration_error(self._teacher_bins, self._positions) if headed else None,
        )


def _teacher_confidence(targets: SparseTargets, temperatures: Sequence[float]) -> Array:
    """The teacher's probability of its most probable token, (n,): normalised with the label's own mass where T=1 is
    stored, for codes of log-probabilities are coarse."""
    log_p = targets.head_logprobs[:, 0].astype(np.float64)
    if 1.0 in temperatures:
        log_p = log_p - targets.log_partition[:, list(temperatures).index(1.0)]
    return np.exp(np.minimum(log_p, 0.0))


def print_evaluation(found: Evaluation) -> None:
    """The figures as a table on stdout."""
    on_cache = found.on_cache
    size = f"{on_cache.examples:,} examples, {on_cache.positions:,} positions" if on_cache else ""
    table = Table(f"{Path(found.model)}", size)
    for name, value in rows(found).items():
        table.add_row(name, value)
    results().print(table)
