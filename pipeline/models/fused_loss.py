"""The distillation loss from hidden states, without logits in memory: matrix products, losses and gradients by slices.

One autograd function. Its forward pass makes the logits of some rows, turns them into the gradient of the loss with
respect to them in place, multiplies that into the gradients of hidden states and head, and forgets it: three matrix
products a row, as many as plain training has, and nothing of the size [positions, vocabulary]. The backward pass only
scales; where no gradient is wanted, none is made. What is computed is ``losses.distillation_loss``; the formulas are
beside the code.

Legend: N target positions, n rows being worked on, H width, V vocabulary, S entries of a sparse label, K of them head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.models.losses import LossSettings, LossSums, outcome_divergence

SLICE_LOGITS = 1 << 24  # of one matrix product: enough rows for its speed, 64 MiB in float32
CACHED_LOGITS = 1 << 19  # worked on at a time: what a processor's cache holds


@dataclass(frozen=True)
class TeacherRows:
    """A teacher in memory, for exact distillation: what its head sees at each target position."""

    hidden_NH: Tensor
    head: LMHead
    vocab_size: int  # ids beyond it are no tokens and get no mass

    def __getitem__(self, rows: slice) -> Tensor:
        """Logits (n, vocab_size) of some rows, in float32 at least."""
        return _upcast(self.head.logits(self.hidden_NH[rows])[:, : self.vocab_size])


# Whether a backward pass may come again; where torch does not tell, gradients are scaled in a copy.
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

Target = SoftLabels[Tensor] | TeacherRows | None


def fused_loss(hidden_NH: Tensor, head: LMHead, gold_N: Tensor, target: Target, settings: LossSettings) -> LossSums:
    """alpha * hard + (1 - alpha) * soft, summed over N positions; differentiable in hidden states, weight and bias.

    Logits are made in the dtype of autocast or else of the weights; everything after them in float32 at least, and so
    are the sums of gradients over slices. ``target`` may be None where alpha is 1. Differentiable once.
    """
    weight, bias = head.weight, head.bias
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_NH, weight = hidden_NH.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    inputs = _LossInputs(head.scale, head.softcap, gold_N, target, settings, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        total, parts = _FusedLoss.apply(hidden_NH, weight, bias, inputs)  # type: ignore[no-untyped-call]
    return LossSums(total, *parts)


@dataclass(frozen=True)
class _LossInputs:
    scale: float
    softcap: float | None
    gold_N: Tensor
    target: Target
    settings: LossSettings
    differentiate: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: _LossInputs
    ) -> tuple[Tensor, Tensor]:
        wanted = [inputs.differentiate and needed for needed in ctx.needs_input_grad[:3]]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        wide = _upcast(hidden[:0]).dtype
        grads = [
            torch.zeros_like(x, dtype=wide) if x is not None and want else None
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        rows = max(16, SLICE_LOGITS // len(weight) // 16 * 16)
        scaled = hidden * inputs.scale if inputs.scale != 1.0 else hidden
        b = bias * inputs.scale if bias is not None and inputs.scale != 1.0 else bias
        logits = torch.empty(min(rows, len(hidden)), len(weight), dtype=weight.dtype, device=weight.device)
        at_once = max(1, CACHED_LOGITS // len(weight)) if weight.device.type == "cpu" else len(logits)
        scratch = torch.empty(at_once, len(weight), dtype=wide, device=weight.device)
        sums = torch.zeros(5, dtype=wide, device=hidden.device)
        for first in range(0, len(hidden), rows):
            part = slice(first, min(first + rows, len(hidden)))
            h, out = scaled[part], logits[: part.stop - first]
            torch.mm(h, weight.t(), out=out) if b is None else torch.addmm(b, h, weight.t(), out=out)
            dz = _upcast(out)
            sums += _losses(dz, part, inputs, scratch, any(wanted))
            if any(wanted):
                _accumulate(grads, dz.to(weight.dtype), part, h, weight, inputs.scale)
        ctx.grads = grads
        return sums[0], sums[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        if torch.compiler.is_compiling() or _keep_graph():  # a second backward pass may come
            grads = [None if g is None else g * grad for g in grads]
        else:  # nobody needs them again: scale in place, and let go, so that autograd takes them over as they are
            ctx.grads = None
            grads = [None if g is None else g.mul_(grad) for g in grads]
        return (*(None if g is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True)), None)


def _accumulate(grads: list[Tensor | None], dz: Tensor, part: slice, h: Tensor, weight: Tensor, scale: float) -> None:
    """Add a slice's share to the gradients of hidden states, weight and bias, for z = scale * (hidden W' + b)."""
    for_hidden, for_weight, for_bias = grads
    if for_hidden is not None:
        for_hidden[part] = torch.mm(dz, weight)
        if scale != 1.0:
            for_hidden[part] *= scale
    if for_weight is not None:
        if for_weight.dtype == dz.dtype:
            for_weight.addmm_(dz.t(), h)
        else:
            for_weight += torch.mm(dz.t(), h)
    if for_bias is not None:
        for_bias.add_(dz.sum(0, dtype=for_bias.dtype), alpha=scale)


def _losses(logits_nV: Tensor, part: slice, inputs: _LossInputs, scratch: Tensor, differentiate: bool) -> Tensor:
    """Sums of total and the four of LossSums, a piece at a time; logits become d total / d logits where asked."""
    rows, found, target = len(scratch), [], inputs.target[part] if inputs.target is not None else None
    for first in range(0, len(logits_nV), rows):
        here = slice(first, first + rows)
        z, gold = logits_nV[here], inputs.gold_N[part][here]
        labels = None if target is None else target[here]
        if inputs.softcap is None:
            found.append(_slice_loss_and_grad_(z, gold, labels, inputs.settings, scratch[: len(z)], differentiate))
            continue
        t = torch.tanh(z / inputs.softcap)
        torch.mul(t, inputs.softcap, out=z)
        found.append(_slice_loss_and_grad_(z, gold, labels, inputs.settings, scratch[: len(z)], differentiate))
        if differentiate:
            z.mul_(1 - t * t)  # d/dx of c tanh(x / c)
    return torch.stack(found).sum(0)


def _exponentials(z: Tensor, m: Tensor, t: float, scratch: Tensor) -> tuple[Tensor | None, Tensor]:
    """exp(z - m) and exp((z - m) / T); at T=2 the first is the second's square and is left out. Overwrites z."""
    z.sub_(m)
    if t == 1.0:
        z.exp_()
        return z, z
    if t == 2.0:
        return None, z.mul_(0.5).exp_()
    e = torch.mul(z, 1.0 / t, out=scratch).exp_()
    return z.exp_(), e


class _Masses(NamedTuple):
    """The masses of n rows; those of tokens outside the head are relative to the largest of them, exp(m)."""

    m: Tensor  # (n, 1)
    e1: Tensor | None  # exp(z - m) (n, V); None at T=2
    e: Tensor  # exp((z - m) / T) (n, V)
    rest: Tensor  # the sum of e (n, 1)
    log_rest: Tensor  # its logarithm, not relative
    lse: Tensor  # of all tokens at T (n, 1)
    lse_1: Tensor  # and at T=1


def _masses(z: Tensor, z_head: Tensor, t: float, scratch: Tensor) -> _Masses:
    """Of logits (n, V), the head's among them -inf and given apart (n, K). Overwrites z."""
    m = z.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    e1, e = _exponentials(z, m, t, scratch)
    rest = e.sum(1, keepdim=True)
    log_rest = m / t + rest.log()
    lse = torch.logaddexp(log_rest, (z_head / t).logsumexp(1, keepdim=True))
    lse_1 = lse
    if t != 1.0:
        squares = torch.linalg.vector_norm(e, dim=1, keepdim=True).square() if e1 is None else e1.sum(1, keepdim=True)
        lse_1 = torch.logaddexp(m + squares.log(), z_head.logsumexp(1, keepdim=True))
    return _Masses(m, e1, e, rest, log_rest, lse, lse_1)


def _softmax_grad_(z: Tensor, mass: _Masses, of_hard: Tensor, of_soft: Tensor, t: float, scratch: Tensor) -> None:
    """Overwrite z with of_hard * exp(z - m) + of_soft * exp((z - m) / T)."""
    if t == 1.0:
        z.mul_(of_hard + of_soft)
    elif mass.e1 is None:
        z.mul_(torch.mul(mass.e, of_hard, out=scratch).add_(of_soft))
    else:
        mass.e1.mul_(of_hard).add_(mass.e.mul_(of_soft))


def _soft(
    log_q_nS: Tensor, log_q_rest_n1: Tensor, labels: SoftLabels[Tensor], settings: LossSettings, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence (n,) and its derivatives with respect to log q_T of the entries (n, S) and of the rest (n, 1)."""
    if settings.tail != "bucket":
        value = (labels.weights * (labels.log_probs - log_q_nS)).sum(1)
        return value, -labels.weights.to(log_q_nS.dtype), torch.zeros_like(log_q_rest_n1)
    with torch.enable_grad():
        log_q = torch.cat([log_q_nS, log_q_rest_n1], dim=1).requires_grad_()
        log_p = torch.cat([labels.log_probs, labels.log_rest[:, None]], dim=1)
        outcomes = labels.head_size + (0 if whole else 1)  # no rest where the head is the whole vocabulary
        value = outcome_divergence(log_q[:, :outcomes], log_p[:, :outcomes], settings.divergence)
        (g,) = torch.autograd.grad(value.sum(), log_q)
    return value.detach(), g[:, :-1], g[:, -1:]


def _dense(teacher: Tensor, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """p_T (n, vocab_size) and, of forward KL, the part sum_v p_T(v) (log p_T(v) - z(v) / T)."""
    log_p = torch.log_softmax(teacher / t, dim=1)
    p = log_p.exp()
    return p, (p * (log_p - z[:, : p.shape[1]] / t)).sum(1)


def _upcast(x: Tensor) -> Tensor:
    """In float32 at least; the tensor itself where it is already."""
    return x if x.dtype == torch.float64 else x.float()


def _slice_loss_and_grad_(
    z: Tensor,
    gold: Tensor,
    target: SoftLabels[Tensor] | Tensor | None,
    settings: LossSettings,
    scratch: Tensor,
    differentiate: bool,
) -> Tensor:
    """Losses of n rows; logits (n, V) become their gradient where asked. A target of logits is a teacher's.

    The head's tokens are taken out first and everything else is exponentiated relative to its own maximum m, so that
    the mass outside the head is exact even where it is 1e-30. With e(v) = exp((z(v) - m) / T), and g the derivative
    of the soft part D with respect to log q_T of each entry:
    d D / d z(v) = (g(v) - sum(g) q_T(v)) / T, and for the bucket of the rest also + g(rest) q_T(v) / q_T(rest) / T.
    """
    alpha, t = settings.alpha, settings.temperature if target is not None else 1.0
    gold_1 = gold[:, None]
    z_gold = z.gather(1, gold_1)
    labels = target if isinstance(target, SoftLabels) else None
    ids = labels.ids if labels is not None else gold_1[:, :0]
    z_ids = z.gather(1, ids)
    k = labels.head_size if labels is not None else 0
    dense = _dense(target, z, t) if isinstance(target, Tensor) else None
    z.scatter_(1, ids[:, :k], -torch.inf)
    mass = _masses(z, z_ids[:, :k], t, scratch)
    hard = mass.lse_1 - z_gold

    g, g_sum, g_rest = torch.zeros_like(z_ids), torch.zeros_like(mass.m), torch.zeros_like(mass.m)
    soft = masses = torch.zeros_like(z_gold[:, 0])
    if labels is not None:
        soft, g, g_rest = _soft(z_ids / t - mass.lse, mass.log_rest - mass.lse, labels, settings, k == z.shape[1])
        g_sum = g.sum(1, keepdim=True) + g_rest
        masses = (z_ids[:, :k] / t - mass.lse).exp().sum(1)
    elif dense is not None:
        soft = dense[1] + mass.lse[:, 0]
        g_sum = -torch.ones_like(mass.m)
        masses = torch.ones_like(soft)

    if differentiate:
        factor = (1.0 - alpha) * t
        of_soft = g_rest / mass.rest.clamp_min(torch.finfo(z.dtype).tiny) - g_sum * (mass.m / t - mass.lse).exp()
        _softmax_grad_(z, mass, alpha * (mass.m - mass.lse_1).exp(), factor * of_soft, t, scratch)
        heads = alpha * (z_ids[:, :k] - mass.lse_1).exp() - factor * g_sum * (z_ids[:, :k] / t - mass.lse).exp()
        z.scatter_(1, ids[:, :k], heads)
        z.scatter_add_(1, ids, factor * g)
        if dense is not None:
            z[:, : dense[0].shape[1]].sub_(dense[0], alpha=factor)
        z.scatter_add_(1, gold_1, torch.full_like(z_gold, -alpha))

    hard_sum, soft_sum = hard.sum(), t * t * soft.sum()
    teacher = -torch.expm1(labels.log_rest).sum() if labels is not None else masses.sum()
    total = alpha * hard_sum + (1.0 - alpha) * soft_sum
    return torch.stack([total, hard_sum, soft_sum, teacher.to(total.dtype), masses.sum()])
