"""The loss against whole distributions and its gradient, in place: ``losses.dense_divergence`` without its graph.

With D a divergence of p_T and q_T over all tokens and h(v) the derivative of D with respect to q_T(v), the slope
T * dD / dz(v) is q_T(v) (h(v) - sum q_T h); a constant in h cancels. An underscore at the end of a name means that the
function overwrites its arguments. Legend: n positions, V tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from logitcask.cache.labels import MASS_FLOOR
from logitcask.pipeline.models.dense.sums import log_sum_exp

BUFFERS = 3  # of (n, V), that a chunk of the loss takes beside logits and target


def dense_loss_and_grad_(
    z: Tensor, gold: Tensor, log_p: Tensor, alpha: float, t: float, divergence: str, room: Tensor, differentiate: bool
) -> Tensor:
    """Return the five sums of LossSums (5,) over n rows; logits z (n, V) become their gradient if asked.

    ``log_p`` (n, tokens) is the teacher's at T, overwritten; ``room`` (BUFFERS, n, V). Tokens that the teacher does not
    have get next to no probability, not none, so that the reverse KL stays finite.
    """
    log_q, one, two = room
    if log_p.shape[1] < z.shape[1]:
        log_p = functional.pad(log_p, (0, z.shape[1] - log_p.shape[1]), value=MASS_FLOOR)
    torch.mul(z, 1.0 / t, out=log_q)
    log_q.sub_(log_sum_exp(log_q, one))
    z_gold, m = z.gather(1, gold[:, None]), z.amax(1, keepdim=True)
    sum_1 = z.sub_(m).exp_().sum(1, keepdim=True)
    hard = m + sum_1.log() - z_gold
    soft, slope = _SLOPES[divergence](log_p, log_q, one, two)
    if differentiate:
        z.mul_(alpha / sum_1).add_(slope, alpha=(1.0 - alpha) * t)
        z.scatter_add_(1, gold[:, None], torch.full_like(z_gold, -alpha))
    hard_sum, soft_sum, mass = hard.sum(), t * t * soft.sum(), torch.ones_like(soft).sum()
    return torch.stack([alpha * hard_sum + (1.0 - alpha) * soft_sum, hard_sum, soft_sum, mass, mass])


def _forward_kl_(log_p: Tensor, log_q: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q), (n,), and its slope (n, V). h = -p / q."""
    torch.sub(log_p, log_q, out=one)
    p = log_p.exp_()
    return one.mul_(p).sum(1), log_q.exp_().sub_(p)


def _reverse_kl_(log_p: Tensor, log_q: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p), (n,), and its slope (n, V). h = log q - log p."""
    torch.sub(log_q, log_p, out=one)
    q = log_q.exp_()
    value = torch.mul(one, q, out=two).sum(1)
    return value, one.sub_(value[:, None]).mul_(q)


def _jsd_(log_p: Tensor, log_q: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Jensen-Shannon divergence (n,) and its slope (n, V). With m = (p + q) / 2, h = log(q / m) / 2."""
    log_m = torch.logaddexp(log_p, log_q, out=one).sub_(math.log(2.0))
    of_p = torch.exp(log_p, out=two).mul_(log_p.sub_(log_m)).sum(1)
    q = torch.exp(log_q, out=two)
    h = log_q.sub_(log_m)
    of_q = torch.mul(h, q, out=one).sum(1)
    return 0.5 * (of_p + of_q), h.sub_(of_q[:, None]).mul_(q).mul_(0.5)


def _tvd_(log_p: Tensor, log_q: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total variation distance (n,) and its slope (n, V). h = sign(q - p) / 2."""
    q = log_q.exp_()
    torch.sub(q, log_p.exp_(), out=one)
    value = 0.5 * torch.abs(one, out=two).sum(1)
    mean = torch.mul(one.sign_(), q, out=two).sum(1, keepdim=True)
    return value, one.sub_(mean).mul_(q).mul_(0.5)


_SLOPES = {"forward-kl": _forward_kl_, "reverse-kl": _reverse_kl_, "jsd": _jsd_, "tvd": _tvd_}
