"""Distillation losses: the plain reference implementation, one line of code per line of mathematics.

Legend: N target positions, V vocabulary, S entries of a sparse label, the first K of them its head, O outcomes.
Log-probabilities are in nats; every loss is per position, shape (N,). KL is forward, KL(teacher || student), unless
named otherwise.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from logitcask.cache.labels import SoftLabels


@dataclass(frozen=True)
class LossSettings:
    """The loss to compute: alpha * hard + (1 - alpha) * T^2 * soft."""

    alpha: float
    temperature: float
    tail: str  # sampled, bucket, renormalize
    divergence: str  # forward-kl, reverse-kl, jsd


class LossSums(NamedTuple):
    """Sums over target positions, so that dividing by their number gives a mean per position over any grouping.

    A tuple, because DDP and FSDP look for tensors in what ``forward`` returns.
    """

    total: Tensor  # differentiable
    hard: Tensor
    soft: Tensor
    teacher_mass: Tensor  # the teacher's probability of the head's tokens, at T
    student_mass: Tensor  # the student's probability of the same tokens, at T


def hard_loss(logits_NV: Tensor, gold_N: Tensor) -> Tensor:
    """Return the cross-entropy with the next token at T=1, shape (N,)."""
    return functional.cross_entropy(logits_NV, gold_N, reduction="none")


def sparse_forward_kl(log_q_NV: Tensor, labels: SoftLabels[Tensor]) -> Tensor:
    """Return sum_s w_s (log p_T(v_s) - log q_T(v_s)), (N,): unbiased for KL(p_T || q_T) if the tail is sampled."""
    log_q_NS = log_q_NV.gather(1, labels.ids)
    return (labels.weights * (labels.log_probs - log_q_NS)).sum(1)


def bucket_divergence(log_q_NV: Tensor, labels: SoftLabels[Tensor], divergence: str) -> Tensor:
    """Return the divergence (N,) over K + 1 outcomes: the head's tokens, and a bucket with the rest's true mass."""
    ids_NK = labels.ids[:, : labels.head_size]
    log_q_NO, log_p_NO = log_q_NV.gather(1, ids_NK), labels.log_probs[:, : labels.head_size]
    if labels.head_size < log_q_NV.shape[1]:
        rest_N1 = log_q_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1, keepdim=True)
        log_q_NO = torch.cat([log_q_NO, rest_N1], dim=1)
        log_p_NO = torch.cat([log_p_NO, labels.log_rest[:, None]], dim=1)
    return outcome_divergence(log_q_NO, log_p_NO, divergence)


def outcome_divergence(log_q_NO: Tensor, log_p_NO: Tensor, divergence: str) -> Tensor:
    """Return the divergence (N,) between two complete distributions over O outcomes, from log-probabilities (N, O)."""
    if divergence == "forward-kl":
        return functional.kl_div(log_q_NO, log_p_NO, reduction="none", log_target=True).sum(1)
    if divergence == "reverse-kl":
        return functional.kl_div(log_p_NO, log_q_NO, reduction="none", log_target=True).sum(1)
    assert divergence == "jsd", divergence
    log_m_NO = torch.logaddexp(log_p_NO, log_q_NO) - math.log(2.0)
    sides = [
        functional.kl_div(log_m_NO, side, reduction="none", log_target=True).sum(1) for side in (log_p_NO, log_q_NO)
    ]
    return 0.5 * (sides[0] + sides[1])


def soft_loss(log_q_NV: Tensor, labels: SoftLabels[Tensor], settings: LossSettings) -> Tensor:
    """Return T^2 times the divergence at T, (N,). T^2 keeps gradients about equal over T (Hinton et al., 2015)."""
    if settings.tail == "bucket":
        divergence_N = bucket_divergence(log_q_NV, labels, settings.divergence)
    else:
        assert settings.divergence == "forward-kl", "only the bucket tail allows other divergences"
        divergence_N = sparse_forward_kl(log_q_NV, labels)
    return settings.temperature**2 * divergence_N


def distillation_loss(
    logits_NV: Tensor, gold_N: Tensor, labels: SoftLabels[Tensor] | None, settings: LossSettings
) -> LossSums:
    """Return alpha * hard + (1 - alpha) * soft, summed over positions. ``labels`` may be None if alpha is 1."""
    hard_N = hard_loss(logits_NV, gold_N)
    if labels is None:
        zero = hard_N.new_zeros(())
        return LossSums(settings.alpha * hard_N.sum(), hard_N.detach().sum(), zero, zero, zero)
    log_q_NV = functional.log_softmax(logits_NV / settings.temperature, dim=1)
    soft_N = soft_loss(log_q_NV, labels, settings)
    head_NK = log_q_NV.detach().gather(1, labels.ids[:, : labels.head_size]).exp()
    total = settings.alpha * hard_N.sum() + (1.0 - settings.alpha) * soft_N.sum()
    return LossSums(
        total=total,
        hard=hard_N.detach().sum(),
        soft=soft_N.detach().sum(),
        teacher_mass=(-torch.expm1(labels.log_rest)).sum(),
        student_mass=head_NK.sum(),
    )
