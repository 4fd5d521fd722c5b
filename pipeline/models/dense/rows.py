"""Teachers whose whole distribution is known: hidden states and the head that reads them, a slice of rows at a time.

Legend: N target positions, n of them, W the teacher's width, V tokens of its vocabulary, K of the label's head,
C coefficients of a hidden state, S caches. An
underscore at the end of a name means that the function overwrites its first argument.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from logitcask.cache.labels import MASS_FLOOR
from logitcask.pipeline.models.dense.sums import log_sum_exp
from logitcask.pipeline.models.head import LMHead

A = TypeVar("A")
B = TypeVar("B")
EXACT = "exact"  # in place of a tail: no approximation stands for the mass outside the head


@dataclass(frozen=True)
class TeacherRows:
    """A teacher in memory, for exact distillation: the hidden states (N, W) that its head reads."""

    hidden_NW: Tensor
    head: LMHead
    vocab_size: int  # ids beyond it are not tokens and get no probability

    def logits(self, rows: slice) -> Tensor:
        """Return the teacher's logits (n, V) of some rows, in at least float32."""
        z = self.head.logits(self.hidden_NW[rows])[:, : self.vocab_size]
        return z if z.dtype == torch.float64 else z.float()

    def log_probs_(self, z_nV: Tensor, rows: slice, t: float, scratch_nV: Tensor) -> Tensor:
        """Overwrite the logits of some rows with log p_T."""
        z_nV.mul_(1.0 / t)
        return z_nV.sub_(log_sum_exp(z_nV, scratch_nV))


@dataclass(frozen=True)
class TranslatedRows:
    """A teacher in memory with another vocabulary: what its distributions become in the student's."""

    translate: Callable[[slice], Tensor]  # log-probabilities (n, V) at T=1 of some positions; tokens may have none
    vocab_size: int

    def logits(self, rows: slice) -> Tensor:
        """Return log-probabilities (n, V) of some rows."""
        return self.translate(rows)

    def log_probs_(self, z_nV: Tensor, rows: slice, t: float, scratch_nV: Tensor) -> Tensor:
        """Overwrite what ``logits`` gives for some rows with log p_T; next to no probability stands for none."""
        z_nV.mul_(1.0 / t)
        return z_nV.sub_(log_sum_exp(z_nV, scratch_nV)).clamp_min_(MASS_FLOOR)


@dataclass(frozen=True)
class ExactLabels(Generic[A]):
    """Exact labels of N positions in a batch, for any temperature T, as ``SoftLabels`` are sparse ones.

    The head's tokens have their own log-probabilities. The rest has the shape that the hidden states give it, and the
    mass that is stored at the temperature nearest to T, the anchor.
    """

    ids: A  # (N, K) the most probable tokens
    log_probs: A  # (N, K) their log-probabilities at T=1, in nats
    log_tail: A  # (N,) log of the sum of p(v)^(1 / anchor) over all other tokens
    tail_bias: A  # (N,) how far their log-probabilities are above the teacher's, on average, at the anchor, in nats
    codes: A  # (N, C) coefficients of the hidden states, in steps
    steps: A  # (N,)
    source: A  # (N,) which of the caches each position is from
    temperature: float  # T
    anchor: float
    teacher_head: "Callable[[torch.device], CodedHead]"  # brings it to a device
    tail: ClassVar[str] = EXACT

    def __len__(self) -> int:
        return len(self.log_tail)  # type: ignore[arg-type]

    def map(self, function: Callable[[Any], B]) -> "ExactLabels[B]":
        """Apply a function to each of the arrays."""
        return ExactLabels(
            ids=function(self.ids),
            log_probs=function(self.log_probs),
            log_tail=function(self.log_tail),
            tail_bias=function(self.tail_bias),
            codes=function(self.codes),
            steps=function(self.steps),
            source=function(self.source),
            temperature=self.temperature,
            anchor=self.anchor,
            teacher_head=self.teacher_head,
        )

    def __getitem__(self, rows: slice) -> "ExactLabels[A]":
        return self.map(lambda array: array[rows])

    def to(self, device: Any, **options: Any) -> "ExactLabels[A]":
        """Move the tensors to a device."""
        return self.map(lambda tensor: tensor.to(device, **options))

    def pin_memory(self, *device: Any) -> "ExactLabels[A]":
        """Copy the tensors to page-locked memory."""
        return self.map(lambda tensor: tensor.pin_memory(*device))

    def rows(self: "ExactLabels[Tensor]", device: torch.device) -> "ExactRows":
        """Return the labels with the teacher's head, on a device."""
        return ExactRows(self.to(device), self.teacher_head(device))


@dataclass(frozen=True)
class CodedHead:
    """A teacher's head as caches keep it, with the basis of each one's hidden states: h = coefficients basis + centre.

    The caches are of one teacher; shorter bases are padded. A batch may have none of the longest one's labels, and then
    has fewer coefficients.
    """

    head: LMHead
    bases_SCW: Tensor
    centres_SW: Tensor

    def hidden(self, labels: ExactLabels[Tensor]) -> Tensor:
        """Return the hidden states of labels, (n, W)."""
        values_nC = labels.codes.to(labels.steps.dtype) * labels.steps[:, None]
        if len(self.bases_SCW) == 1:
            return torch.addmm(self.centres_SW, values_nC, self.bases_SCW[0])
        hidden_nW = self.centres_SW[labels.source]
        for source, basis_CW in enumerate(self.bases_SCW[:, : values_nC.shape[1]]):
            hidden_nW += (labels.source == source)[:, None] * (values_nC @ basis_CW)
        return hidden_nW


@dataclass(frozen=True)
class ExactRows:
    """A teacher whose hidden states and exact heads come from caches."""

    labels: ExactLabels[Tensor]
    coded: CodedHead

    @property
    def temperature(self) -> float:
        """The temperature of the labels."""
        return self.labels.temperature

    @property
    def vocab_size(self) -> int:
        """The tokens of the teacher's vocabulary."""
        return len(self.coded.head.weight)

    def map(self, function: Callable[[Tensor], Tensor]) -> "ExactRows":
        """Apply a function to each of the labels' tensors."""
        return ExactRows(self.labels.map(function), self.coded)

    def logits(self, rows: slice) -> Tensor:
        """Return the logits (n, V) that hidden states give, of which ``log_probs_`` takes the tail's shape."""
        with torch.autocast(self.labels.log_tail.device.type, enabled=False):  # rounding is in the labels' bits
            z = self.coded.head.logits(self.coded.hidden(self.labels[rows]))
        return z if z.dtype == torch.float64 else z.float()

    def log_probs_(self, z_nV: Tensor, rows: slice, t: float, scratch_nV: Tensor) -> Tensor:
        """Overwrite what ``logits`` gives for some rows with log p_T of the label."""
        labels = self.labels[rows]
        z_nV.scatter_(1, labels.ids, -torch.inf)
        log_tail = labels.log_tail[:, None].clamp_min(MASS_FLOOR).to(z_nV.dtype)
        at = log_sum_exp(z_nV.mul_(1.0 / t), scratch_nV)
        if labels.ids.shape[1] < z_nV.shape[1] and t != labels.anchor:
            at_anchor = log_sum_exp(torch.mul(z_nV, t / labels.anchor, out=scratch_nV), scratch_nV)
            log_tail = at + (log_tail - at_anchor) * (labels.anchor / t)
        log_head = labels.log_probs.to(z_nV.dtype) / t
        log_z = torch.logaddexp(log_head.logsumexp(1, keepdim=True), log_tail)
        z_nV.add_(log_tail - log_z - at)
        return z_nV.scatter_(1, labels.ids, log_head - log_z)


DenseRows = TeacherRows | TranslatedRows | ExactRows


def for_divergence(target: B, divergence: str) -> B:
    """Return what a divergence is taken from: exact labels lose the bias of their tails' log p for reverse KL.

    Its slope is linear in log p, so that errors without a bias cancel over positions. The others take the tail with the
    mass that it has.
    """
    if divergence != "reverse-kl" or not isinstance(target, ExactRows):
        return target
    labels = target.labels
    return replace(target, labels=replace(labels, log_tail=labels.log_tail - labels.tail_bias))


def log_probs(target: DenseRows, rows: slice, t: float) -> Tensor:
    """Return log p_T (n, V) of some rows."""
    z_nV = target.logits(rows)
    return target.log_probs_(z_nV, rows, t, torch.empty_like(z_nV))
