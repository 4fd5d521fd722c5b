"""A student against the text and the teacher of a cache: per-position metrics, their means and standard errors.

Legend: N target positions, n of them whose logits fit in memory, V vocabulary, H hidden size, J temperatures,
E examples, C = 3 + J columns per position. Losses and divergences are in nats.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from logitcask.cache.labels import ExactTargets, Example, SoftLabels, SparseTargets, soft_labels, temperature_index
from logitcask.cache.manifest import LabelSettings, metadata_values
from logitcask.cache.reader import CacheReader, matching
from logitcask.pipeline.batches.collate import Collator, TeacherHead, TrainingExample, exact_labels
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.console import track
from logitcask.pipeline.models.dense.rows import EXACT, log_probs
from logitcask.pipeline.models.head import SLICE_LOGITS, LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.losses import bucket_divergence, dense_divergence, hard_loss, sparse_forward_kl
from logitcask.pipeline.models.students.student import require_room
from logitcask.pipeline.runs.evaluation import Divergence, Group, OnCache
from logitcask.pipeline.text.tokens.encoded import Encoded

BINS = 15  # of the calibration error, of equal width
Array = NDArray[np.float64]


def evaluate_on_cache(
    model: PreTrainedModel,
    reader: CacheReader,
    limit: int | None,
    batch_size: int,
    where: Mapping[str, Sequence[str]] | None = None,
    temperatures: Sequence[float] | None = None,
) -> OnCache:
    """Evaluate a model on the first ``limit`` examples of a cache, in its order (None: all of them).

    ``where`` gives the values that the examples must have, by column; ``temperatures`` those of the divergence, by
    default the cache's. Only exact labels have others.

    Raises LogitcaskError if the vocabulary or the examples do not fit the model, or a temperature is not stored.
    """
    label = reader.manifest.label
    chosen_at = tuple(temperatures or label.temperatures)
    for temperature in chosen_at if label.exact is None else ():
        temperature_index(label.temperatures, temperature, "--temperatures")
    require_room(model, label.vocab_size, reader.manifest.data.longest)
    head = read_head(model)
    teacher_head = StoredHead(((reader.path, reader.opened),)) if label.exact else None
    totals = _Totals(label, metadata_values(reader.manifest), chosen_at, teacher_head)
    chosen = matching(reader, where or {})[:limit]
    collator = Collator(0, (), 1.0, "sampled")
    with track("evaluating", len(chosen), "examples") as advance, torch.inference_mode():
        for first in range(0, len(chosen), batch_size):
            examples = [reader.example(int(i)) for i in chosen[first : first + batch_size]]
            batch = collator([TrainingExample(Encoded(e.input_ids, e.target_mask), None) for e in examples])
            ids, lengths = batch["input_ids"].to(model.device), batch["is_token"].sum(1)
            hidden = last_hidden_states(model, ids, lengths=lengths).flatten(0, 1)
            totals.add(examples, hidden[batch["target_index"].to(model.device)], head, batch["gold"])
            advance(len(examples))
    return totals.on_cache(str(reader.path))


class _Totals:
    """Sums over the examples so far."""

    def __init__(
        self,
        label: LabelSettings,
        values: Mapping[str, Sequence[str]],
        temperatures: Sequence[float],
        teacher_head: TeacherHead | None = None,
    ) -> None:
        """Take what the examples' labels are; ``teacher_head`` is that of exact ones."""
        self._label, self._values, self._temperatures, self._teacher_head = label, values, temperatures, teacher_head
        self._groups: dict[tuple[str, int], ClusterSums] = {}
        exact = label.head_size >= label.vocab_size
        self._tail = "sampled" if label.tail_draws or exact else "bucket"
        self._estimate = "exact" if exact else {"sampled": "unbiased", "bucket": "lower bound"}[self._tail]
        if not label.knows("rest"):  # it counts as none: the teacher is its head, renormalised
            self._estimate = "of the head alone"
        if teacher_head:
            self._tail, self._estimate = EXACT, "exact labels"
        self._sums = ClusterSums(3 + len(temperatures))  # positions, hard loss, teacher's hard loss, KLs
        self._bins, self._teacher_bins = np.zeros((BINS, 2)), np.zeros((BINS, 2))
        self._agreed = self._examples = self._positions = 0

    def add(self, examples: Sequence[Example], hidden_NH: Tensor, head: LMHead, gold_N: Tensor) -> None:
        """Add examples; hidden states and next tokens are those of their N target positions, concatenated."""
        targets = SparseTargets.concatenate([example.targets for example in examples])
        at_once = max(1, SLICE_LOGITS // len(head.weight))
        columns = np.concatenate(
            [
                self._add_slice(targets[part], hidden_NH[part], head, gold_N[part])
                for part in (slice(i, i + at_once) for i in range(0, len(targets), at_once))
            ]
        )
        starts = np.cumsum([0, *(len(example.targets) for example in examples[:-1])])
        rows = np.add.reduceat(columns, starts, axis=0)
        self._sums.add(rows)
        for row, example in zip(rows, examples, strict=True):
            for group in example.metadata.items():
                self._groups.setdefault(group, ClusterSums(rows.shape[1])).add(row[None])
        self._examples += len(examples)
        self._positions += len(targets)

    def _add_slice(self, targets: SparseTargets, hidden_nH: Tensor, head: LMHead, gold_n: Tensor) -> Array:
        """Return the columns to sum, (n, C), of n positions."""
        temperatures = self._label.temperatures
        device, of = hidden_nH.device, (self._label, self._tail, self._teacher_head)
        labels = ((t, labels_at(t, targets, *of, device)) for t in self._temperatures)
        metrics = position_metrics(head.logits(hidden_nH), gold_n.to(hidden_nH.device), labels, self._tail)
        top, gold = metrics.top_n.cpu().numpy(), gold_n.numpy()
        self._bins += calibration_bins(metrics.confidence_n.cpu().double().numpy(), top == gold)
        if self._label.head_size:
            first = targets.head_ids[:, 0]
            self._agreed += int((top == first).sum())
            self._teacher_bins += calibration_bins(_teacher_confidence(targets, temperatures), first == gold)
        of_teacher = -targets.gold_logprobs.astype(np.float64) if self._label.knows("gold") else np.zeros(len(gold))
        columns = [np.ones(len(gold)), metrics.hard_n.cpu().double().numpy(), of_teacher]
        return np.concatenate([np.stack(columns, axis=1), metrics.kl_nJ.cpu().double().numpy()], axis=1)

    def on_cache(self, cache: str) -> OnCache:
        """Return the figures of all examples added."""
        hard, error = self._sums.mean(1)
        kl = [(t, *self._sums.mean(3 + j)) for j, t in enumerate(self._temperatures)]
        has_head = self._label.head_size > 0
        with np.errstate(over="ignore"):
            perplexity, teacher_perplexity = float(np.exp(hard)), float(np.exp(self._sums.mean(2)[0]))
        return OnCache(
            cache=cache,
            examples=self._examples,
            positions=self._positions,
            perplexity=perplexity,
            hard_loss=hard,
            hard_loss_standard_error=error,
            kl_estimate=self._estimate,
            kl=[Divergence(temperature=t, kl=value, standard_error=spread) for t, value, spread in kl],
            top1_agreement=self._agreed / self._positions if has_head else None,
            calibration_error=calibration_error(self._bins, self._positions),
            teacher_perplexity=teacher_perplexity if self._label.knows("gold") else None,
            teacher_calibration_error=calibration_error(self._teacher_bins, self._positions) if has_head else None,
            groups=[self._group(*group) for group in sorted(self._groups)],
        )

    def _group(self, column: str, code: int) -> Group:
        sums = self._groups[column, code]
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(sums.mean(1)[0]))
        kl = [(t, *sums.mean(3 + j)) for j, t in enumerate(self._temperatures)]
        return Group(
            column=column,
            value=self._values[column][code - 1] if code else None,
            examples=sums.examples,
            positions=int(sums.positions),
            perplexity=perplexity,
            kl=[Divergence(temperature=t, kl=value, standard_error=spread) for t, value, spread in kl],
        )


def labels_at(
    t: float,
    targets: SparseTargets,
    label: LabelSettings,
    tail: str,
    teacher_head: TeacherHead | None,
    device: torch.device,
) -> SoftLabels[Tensor] | Tensor:
    """Return the labels of n positions at T; of exact ones, which ``teacher_head`` reads, log p_T (n, V)."""
    stored = tuple(label.temperatures)
    if teacher_head is None or not isinstance(targets, ExactTargets):
        return soft_labels(targets, stored, t, tail).map(torch.from_numpy).to(device)
    labels = exact_labels([(targets, 0)], [stored], stored, t, label.head_size, teacher_head)
    return log_probs(labels.map(torch.from_numpy).rows(device), slice(None), t)


def _teacher_confidence(targets: SparseTargets, temperatures: Sequence[float]) -> Array:
    """Return the teacher's probability of its most probable token, (n,).

    It is normalised with the label's own mass if T=1 is stored, since log-probabilities are stored coarsely.
    """
    log_p = targets.head_logprobs[:, 0].astype(np.float64)
    if 1.0 in temperatures:
        log_p = log_p - targets.log_partition[:, list(temperatures).index(1.0)]
    return np.exp(np.minimum(log_p, 0.0))


@dataclass(frozen=True)
class PositionMetrics:
    """Metrics of n target positions."""

    hard_n: Tensor  # cross-entropy with the next token
    kl_nJ: Tensor  # KL(p_T || q_T) at each temperature, estimated from the label
    top_n: Tensor  # the student's most probable token
    confidence_n: Tensor  # its probability at T=1


def position_metrics(
    logits_nV: Tensor, gold_n: Tensor, labels: Iterable[tuple[float, SoftLabels[Tensor] | Tensor]], tail: str
) -> PositionMetrics:
    """Return the metrics of n rows of logits; ``labels`` has J pairs of a temperature and the teacher's entries at it.

    These may be the whole log p_T, (n, tokens). With tail ``sampled`` the KL is unbiased, and exact if the head is the
    whole vocabulary; with ``bucket`` all tokens outside the head count as one outcome, and it is a lower bound.
    """
    log_q_nV = functional.log_softmax(logits_nV, dim=1)
    log_top_n, top_n = log_q_nV.max(1)
    divergences = []
    for temperature, entries in labels:
        tempered = log_q_nV if temperature == 1.0 else functional.log_softmax(logits_nV / temperature, dim=1)
        if isinstance(entries, Tensor):
            divergences.append(dense_divergence(tempered, entries, "forward-kl"))
        elif tail == "bucket":
            divergences.append(bucket_divergence(tempered, entries, "forward-kl"))
        else:
            divergences.append(sparse_forward_kl(tempered, entries))
    return PositionMetrics(hard_loss(logits_nV, gold_n), torch.stack(divergences, dim=1), top_n, log_top_n.exp())


def calibration_bins(confidence_n: Array, right_n: NDArray[np.bool_]) -> Array:
    """Return sums per bin of confidence, (BINS, 2): of the confidences, and of the correct predictions."""
    index = np.minimum((confidence_n * BINS).astype(np.int64), BINS - 1)
    return np.stack([np.bincount(index, weights, BINS) for weights in (confidence_n, right_n)], axis=1)


def calibration_error(bins: Array, positions: int) -> float:
    """Return the expected calibration error: |mean confidence - accuracy| per bin, weighted by the bin's size.

    Source: Naeini et al., 2015.
    """
    return float(np.abs(bins[:, 0] - bins[:, 1]).sum() / positions)


class ClusterSums:
    """Means over positions with their standard errors over examples, in constant memory.

    The row of an example holds the number of its positions, then sums over them. A mean over positions is a ratio of
    two sums over examples, R = sum k / sum n; its variance is that of sum (k - R n) over (sum n)^2 (Cochran, Sampling
    Techniques, 1977, section 2.11), so that positions of one example need not be independent.
    """

    def __init__(self, columns: int) -> None:
        self.examples = 0
        self._sums = np.zeros(columns)
        self._products = np.zeros((columns, columns))

    def add(self, rows_EC: Array) -> None:
        """Add the rows of E examples, (E, C)."""
        self.examples += len(rows_EC)
        self._sums += rows_EC.sum(0)
        self._products += rows_EC.T @ rows_EC

    @property
    def positions(self) -> float:
        """The positions of the examples so far."""
        return float(self._sums[0])

    def mean(self, column: int) -> tuple[float, float | None]:
        """Return the mean over positions and its standard error, which is None for a single example."""
        positions, count = self.positions, self.examples
        ratio = self._sums[column] / positions
        if count < 2:
            return float(ratio), None
        p = self._products
        spread = p[column, column] - 2 * ratio * p[column, 0] + ratio**2 * p[0, 0]
        return float(ratio), float(np.sqrt(max(0.0, spread) * count / (count - 1)) / positions)
