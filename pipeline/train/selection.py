"""A soft loss on some of the positions: those that have labels, or where the student or the teacher is least certain.

A share is selected of each example, its positions of highest entropy, so that neither the batch size nor accumulation
nor the number of ranks changes which. Legend: N target positions, K of them selected, V vocabulary, H width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.batches.collate import Batch
from logitcask.pipeline.models.dense.rows import ExactRows, log_probs
from logitcask.pipeline.models.fused_loss import fused_loss
from logitcask.pipeline.models.head import SLICE_LOGITS, LMHead
from logitcask.pipeline.models.losses import LossSettings, LossSums


@dataclass(frozen=True)
class Selection:
    """Which positions take part in the soft loss."""

    by: str  # entropy (the student's), teacher-entropy
    share: float  # of each example's target positions, rounded up

    def counts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the number of target positions per example, (E,), and how many of them are selected."""
        counts = torch.unique_consecutive(_examples(batch), return_counts=True)[1]
        return counts, (counts * self.share - 1e-9).ceil().long()

    def rows(self, batch: Batch, entropy_N: Tensor) -> Tensor:
        """Return the selected positions, (K,), ascending; of equal ones the first."""
        counts, selected = self.counts(batch)
        example_N = torch.repeat_interleave(counts)
        order = entropy_N.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)
        order = order[example_N[order].argsort(stable=True)]
        rank_N = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[example_N]
        return order[rank_N < selected[example_N]].sort().values


def selected_loss(
    hidden_NH: Tensor, head: LMHead, batch: Batch, settings: LossSettings, selection: Selection
) -> LossSums:
    """Return alpha * hard over all positions + (1 - alpha) * soft over the selected ones, as sums over N positions.

    The batch's ``soft_scale`` is the step's number of positions per selected one, by which the mean of the soft loss
    is one over the selected. No position passes the head twice. At alpha 0 those that are not selected are left out of
    it, and of the hard loss that is logged.
    """
    labels: SoftLabels[Tensor] | ExactRows = batch["soft_labels"]
    entropy_N = student_entropy(hidden_NH, head) if selection.by == "entropy" else teacher_entropy(labels)
    rows, gold_N, scale, alpha = selection.rows(batch, entropy_N), batch["gold"], batch["soft_scale"], settings.alpha
    weight = alpha + (1.0 - alpha) * scale  # of a selected position's loss with alpha / weight in place of alpha
    chosen = labels.map(lambda part: part[rows])
    both = fused_loss(hidden_NH[rows], head, gold_N[rows], chosen, replace(settings, alpha=alpha / weight))
    scaled = [part * scale for part in (both.hard, both.soft, both.teacher_mass, both.student_mass)]
    if alpha == 0.0:
        return LossSums(weight * both.total, *scaled)
    others_N = torch.ones_like(gold_N, dtype=torch.bool).index_fill(0, rows, False)
    hard = fused_loss(hidden_NH[others_N], head, gold_N[others_N], None, replace(settings, alpha=1.0, own=None))
    return LossSums(weight * both.total + alpha * hard.total, both.hard + hard.hard, *scaled[1:])


def loss_of_replay(hidden_NH: Tensor, head: LMHead, batch: Batch, settings: LossSettings) -> LossSums:
    """Return the sums over positions of which only those in ``labelled`` (N,) have labels; the others' loss is hard."""
    known_N, gold_N = batch["labelled"], batch["gold"]
    groups = ((known_N, batch.get("soft_labels"), settings), (~known_N, None, replace(settings, alpha=1.0, own=None)))
    sums = [
        fused_loss(hidden_NH[rows_N], head, gold_N[rows_N], labels, how)
        for rows_N, labels, how in groups
        if bool(rows_N.any()) or not len(gold_N)
    ]
    return LossSums(*(torch.stack(parts).sum(0) for parts in zip(*(part[:5] for part in sums), strict=True)))


@torch.no_grad()
def student_entropy(hidden_NH: Tensor, head: LMHead) -> Tensor:
    """Return the entropy of the student's distribution at T=1, (N,), in nats; a slice of logits at a time."""
    rows, dtype = max(16, SLICE_LOGITS // len(head.weight)), head.weight.dtype
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
    cast = replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
    parts = [hidden_NH.sum(1)[:0]]
    for first in range(0, len(hidden_NH), rows):
        z = cast.logits(hidden_NH[first : first + rows].to(dtype))
        log_q = torch.log_softmax(z if z.dtype == torch.float64 else z.float(), dim=1)
        parts.append(-(log_q.exp() * log_q).sum(1))
    return torch.cat(parts)


def teacher_entropy(labels: SoftLabels[Tensor] | ExactRows) -> Tensor:
    """Return the entropy of the teacher's distribution at T, (N,), in nats, as the labels estimate it.

    With a bucket it is that of the head's tokens and the rest as one more outcome.
    """
    if isinstance(labels, ExactRows):
        rows, slices = max(16, SLICE_LOGITS // labels.vocab_size), [labels.labels.log_tail[:0]]
        for first in range(0, len(labels.labels), rows):
            log_p = log_probs(labels, slice(first, first + rows), labels.temperature)
            slices.append(-(log_p.exp() * log_p).sum(1))
        return torch.cat(slices)
    entropy_N: Tensor = -(labels.weights * labels.log_probs).sum(1)
    if labels.tail == "bucket":
        entropy_N -= labels.log_rest.exp() * labels.log_rest
    return entropy_N


def _examples(batch: Batch) -> Tensor:
    """Return the example of each target position, (N,), as an ascending number."""
    index_N: Tensor = batch["target_index"]
    if "position_ids" not in batch:
        return torch.div(index_N, batch["input_ids"].shape[1], rounding_mode="floor")
    starts: Tensor = batch["position_ids"] == 0
    return starts.flatten().cumsum(0)[index_N]
