"""The distillation loss from hidden states, without the full logits: products, losses and gradients slice by slice.

A single autograd function. Its forward pass computes the logits of one slice of rows, overwrites them with the gradient
of the loss with respect to them, multiplies that into the gradients of hidden states and head, and drops it: three
matrix products per row, as many as in plain training, and nothing of size [positions, vocabulary]. The backward pass
only scales; if no gradient is needed, none is computed. The value is that of ``losses.distillation_loss``; the formulas
stand beside the code.

Legend: N target positions, n rows of a slice or chunk, H width, V vocabulary, S entries of a sparse label, the first K
of them its head. An underscore at the end of a name means that the function overwrites its first argument.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models.dense.loss import BUFFERS, dense_loss_and_grad_
from logitcask.pipeline.models.dense.rows import DenseRows, for_divergence, log_probs
from logitcask.pipeline.models.head import CACHED_LOGITS, SLICE_LOGITS, LMHead
from logitcask.pipeline.models.losses import (
    LossSettings,
    LossSums,
    distillation_loss,
    outcome_divergence,
    position_losses,
)

# Whether another backward pass may follow. If torch cannot report it, assume so: gradients are scaled in a copy.
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

Target = SoftLabels[Tensor] | DenseRows | None


def fused_loss(hidden_NH: Tensor, head: LMHead, gold_N: Tensor, target: Target, settings: LossSettings) -> LossSums:
    """Return alpha * hard + (1 - alpha) * soft, summed over N positions, from hidden states (N, H) and ids (N,).

    Differentiable once, with respect to hidden states, weight and bias. Logits are computed in autocast's dtype, or
    else in that of the weights; everything after them, and sums of gradients over slices, in at least float32.
    ``target`` may be None if alpha is 1.
    """
    hidden_NH, weight, bias = _autocast(hidden_NH, head)
    device = hidden_NH.device.type
    target = for_divergence(target, settings.divergence)
    loss_inputs = _LossInputs(head.scale, head.softcap, gold_N, target, settings, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        total, parts = _FusedLoss.apply(hidden_NH, weight, bias, loss_inputs)  # type: ignore[no-untyped-call]
    return LossSums(total, *parts)


def fused_position_losses(
    hidden_NH: Tensor, head: LMHead, gold_N: Tensor, target: Target, settings: LossSettings
) -> Tensor:
    """Return the loss per position, (N,), of which any function may be differentiated.

    Weights per position are not known until the backward pass, so it computes each slice again: a third more products
    than ``fused_loss``.
    """
    hidden_NH, weight, bias = _autocast(hidden_NH, head)
    target = for_divergence(target, settings.divergence)

    def losses_of(part: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = _upcast(LMHead(weight, bias, head.scale, head.softcap).logits(hidden))
        dense = log_probs(target, part, settings.temperature) if isinstance(target, DenseRows) else None
        labels = target[part] if isinstance(target, SoftLabels) else dense
        return position_losses(logits, gold_N[part], labels, settings)[0]

    rows = max(16, SLICE_LOGITS // len(weight) // 16 * 16)
    parts = [slice(first, first + rows) for first in range(0, len(hidden_NH), rows)]
    how = {"use_reentrant": False, "preserve_rng_state": False, "early_stop": False}
    with torch.autocast(hidden_NH.device.type, enabled=False):
        losses: list[Tensor] = [
            checkpoint(losses_of, part, hidden_NH[part], weight, bias, **how)  # type: ignore[arg-type]
            for part in parts
        ]
    if not losses:  # a rank without examples: its zero gradients are those of the others' tensors, for which DDP waits
        return LMHead(weight, bias, head.scale, head.softcap).logits(hidden_NH).sum(1)
    return torch.cat(losses)


def _autocast(hidden_NH: Tensor, head: LMHead) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states, weight and bias of the head, in autocast's dtype where it is enabled."""
    device, weight, bias = hidden_NH.device.type, head.weight, head.bias
    if not torch.is_autocast_enabled(device):
        return hidden_NH, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden_NH.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@dataclass(frozen=True)
class _LossInputs:
    """What the loss needs beside the tensors it is differentiated by."""

    scale: float
    softcap: float | None
    gold_N: Tensor
    target: Target
    settings: LossSettings
    differentiate: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss_inputs: _LossInputs
    ) -> tuple[Tensor, Tensor]:
        """Return the total () and the other four sums of LossSums (4,), for hidden (N, H), weight (V, H), bias (V,)."""
        wanted = [loss_inputs.differentiate and needed for needed in ctx.needs_input_grad[:3]]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        wide = _upcast(hidden[:0]).dtype
        grads = [
            torch.zeros_like(x, dtype=wide) if x is not None and want else None
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        rows = max(16, SLICE_LOGITS // len(weight) // 16 * 16)
        scale = loss_inputs.scale
        scaled = hidden * scale if scale != 1.0 else hidden
        b = bias * scale if bias is not None and scale != 1.0 else bias
        logits = torch.empty(min(rows, len(hidden)), len(weight), dtype=weight.dtype, device=weight.device)
        chunk = max(1, CACHED_LOGITS // len(weight)) if weight.device.type == "cpu" else len(logits)
        dense = isinstance(loss_inputs.target, DenseRows)
        scratch = torch.empty(BUFFERS if dense else 1, chunk, len(weight), dtype=wide, device=weight.device)
        sums = torch.zeros(5, dtype=wide, device=hidden.device)
        for first in range(0, len(hidden), rows):
            part = slice(first, min(first + rows, len(hidden)))
            h, out = scaled[part], logits[: part.stop - first]
            torch.mm(h, weight.t(), out=out) if b is None else torch.addmm(b, h, weight.t(), out=out)
            dz = _upcast(out)
            sums += _chunked_loss_and_grad_(dz, part, loss_inputs, scratch, any(wanted))
            if any(wanted):
                _accumulate(grads, dz.to(weight.dtype), part, h, weight, scale)
        ctx.grads = grads
        return sums[0], sums[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden (N, H), weight (V, H) and bias (V,), scaled by that of the total ()."""
        grads = ctx.grads
        if torch.compiler.is_compiling() or _keep_graph():  # a second backward pass may follow
            grads = [None if g is None else g * grad for g in grads]
        else:  # last use: scale in place and drop our references, so that autograd takes them without copying
            ctx.grads = None
            grads = [None if g is None else g.mul_(grad) for g in grads]
        return (*(None if g is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True)), None)


def _accumulate(grads: list[Tensor | None], dz: Tensor, part: slice, h: Tensor, weight: Tensor, scale: float) -> None:
    """Add a slice, dz (n, V) and h (n, H), to the gradients of hidden (N, H), W (V, H) and b (V,).

    z = scale * (hidden W' + b).
    """
    hidden_grad, weight_grad, bias_grad = grads
    if hidden_grad is not None:
        hidden_grad[part] = torch.mm(dz, weight)
        if scale != 1.0:
            hidden_grad[part] *= scale
    if weight_grad is not None:
        if weight_grad.dtype == dz.dtype:
            weight_grad.addmm_(dz.t(), h)
        else:
            weight_grad += torch.mm(dz.t(), h)
    if bias_grad is not None:
        bias_grad.add_(dz.sum(0, dtype=bias_grad.dtype), alpha=scale)


def _chunked_loss_and_grad_(
    logits_nV: Tensor, part: slice, loss_inputs: _LossInputs, scratch: Tensor, differentiate: bool
) -> Tensor:
    """Return the sums of LossSums (5,) over a slice, chunk by chunk; logits (n, V) become their gradient if asked."""
    softcap, gold_n, target = loss_inputs.softcap, loss_inputs.gold_N[part], loss_inputs.target
    sums, t = [], loss_inputs.settings.temperature
    sparse = target[part] if isinstance(target, SoftLabels) else None
    dense = target.logits(part).to(scratch.dtype) if isinstance(target, DenseRows) else None
    for first in range(0, len(logits_nV), scratch.shape[1]):
        chunk = slice(first, first + scratch.shape[1])
        z, gold = logits_nV[chunk], gold_n[chunk]
        room = scratch[:, : len(z)]
        label: SoftLabels[Tensor] | Tensor | None = None if sparse is None else sparse[chunk]
        if isinstance(target, DenseRows) and dense is not None:
            rows, raw = slice(part.start + first, part.start + first + len(z)), dense[chunk]
            label = target.log_probs_(raw, rows, t, room[0, :, : raw.shape[1]])
        if softcap is None:
            sums.append(_loss_and_grad_(z, gold, label, loss_inputs.settings, room, differentiate))
            continue
        tanh = torch.tanh(z / softcap)
        torch.mul(tanh, softcap, out=z)
        sums.append(_loss_and_grad_(z, gold, label, loss_inputs.settings, room, differentiate))
        if differentiate:
            z.mul_(1 - tanh * tanh)  # d/dx of c tanh(x / c)
    return torch.stack(sums).sum(0)


def _loss_and_grad_(
    z: Tensor,
    gold: Tensor,
    label: SoftLabels[Tensor] | Tensor | None,
    settings: LossSettings,
    room: Tensor,
    differentiate: bool,
) -> Tensor:
    """Return the five sums of LossSums (5,) over n rows; logits z (n, V) become their gradient if asked.

    ``label``: sparse labels, or log p_T (n, tokens) of the whole distribution, which is overwritten.
    """
    if settings.own is not None and label is not None:
        return _own_loss_and_grad_(z, gold, label, settings, differentiate)
    if isinstance(label, Tensor):
        how = settings.alpha, settings.temperature, settings.divergence
        return dense_loss_and_grad_(z, gold, label, *how, room, differentiate)
    return _sparse_loss_and_grad_(z, gold, label, settings, room[0], differentiate)


def _exponentials_(z: Tensor, m: Tensor, t: float, scratch: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return exp(z - m) and exp((z - m) / T), both (n, V); at T=2 the first is None, being the square of the second."""
    z.sub_(m)
    if t == 1.0:
        z.exp_()
        return z, z
    if t == 2.0:
        return None, z.mul_(0.5).exp_()
    e = torch.mul(z, 1.0 / t, out=scratch).exp_()
    return z.exp_(), e


class _SoftmaxTerms(NamedTuple):
    """The terms of the softmax of n rows; e, e1 and rest cover tokens outside the head, relative to their maximum."""

    m: Tensor  # (n, 1), the largest logit outside the head
    e1: Tensor | None  # (n, V), exp(z - m); None at T=2
    e: Tensor  # (n, V), exp((z - m) / T)
    rest: Tensor  # (n, 1), the sum of e
    log_rest: Tensor  # (n, 1), its logarithm, no longer relative to m
    lse: Tensor  # (n, 1), log-sum-exp over all tokens at T
    lse_1: Tensor  # (n, 1), the same at T=1


def _softmax_terms_(z: Tensor, z_head: Tensor, t: float, scratch: Tensor) -> _SoftmaxTerms:
    """Return the softmax's terms for logits z (n, V), in which the head's are -inf, and the head's logits (n, K)."""
    m = z.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    e1, e = _exponentials_(z, m, t, scratch)
    rest = e.sum(1, keepdim=True)
    log_rest = m / t + rest.log()
    lse = torch.logaddexp(log_rest, (z_head / t).logsumexp(1, keepdim=True))
    lse_1 = lse
    if t != 1.0:
        squares = torch.linalg.vector_norm(e, dim=1, keepdim=True).square() if e1 is None else e1.sum(1, keepdim=True)
        lse_1 = torch.logaddexp(m + squares.log(), z_head.logsumexp(1, keepdim=True))
    return _SoftmaxTerms(m, e1, e, rest, log_rest, lse, lse_1)


def _softmax_grad_(z: Tensor, terms: _SoftmaxTerms, hard: Tensor, soft: Tensor, t: float, scratch: Tensor) -> None:
    """Overwrite z (n, V) with hard * exp(z - m) + soft * exp((z - m) / T), for factors (n, 1)."""
    if t == 1.0:
        z.mul_(hard + soft)
    elif terms.e1 is None:
        z.mul_(torch.mul(terms.e, hard, out=scratch).add_(soft))
    else:
        terms.e1.mul_(hard).add_(terms.e.mul_(soft))


def _divergence_and_grad(
    log_q_nS: Tensor, log_q_rest_n1: Tensor, labels: SoftLabels[Tensor], settings: LossSettings, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence (n,) and its derivatives w.r.t. log q_T of the entries (n, S) and the rest (n, 1)."""
    if settings.tail != "bucket":
        value = (labels.weights * (labels.log_probs - log_q_nS)).sum(1)
        return value, -labels.weights.to(log_q_nS.dtype), torch.zeros_like(log_q_rest_n1)
    with torch.enable_grad():
        log_q = torch.cat([log_q_nS, log_q_rest_n1], dim=1).requires_grad_()
        log_p = torch.cat([labels.log_probs, labels.log_rest[:, None]], dim=1)
        outcomes = labels.head_size + (0 if whole else 1)  # no rest if the head is the whole vocabulary
        divergence = outcome_divergence(log_q[:, :outcomes], log_p[:, :outcomes], settings.divergence)
        (g,) = torch.autograd.grad(divergence.sum(), log_q)
    return divergence.detach(), g[:, :-1], g[:, -1:]


def _upcast(x: Tensor) -> Tensor:
    """Return the tensor in at least float32; the same object if it is already."""
    return x if x.dtype == torch.float64 else x.float()


def _sparse_loss_and_grad_(
    z: Tensor,
    gold: Tensor,
    labels: SoftLabels[Tensor] | None,
    settings: LossSettings,
    scratch: Tensor,
    differentiate: bool,
) -> Tensor:
    """Return the five sums of LossSums (5,) over n rows; logits z (n, V) become their gradient if asked.

    ``gold`` has shape (n,), ``scratch`` (n, V).
    The head's tokens are taken out first and everything else is exponentiated relative to its own maximum m, so that
    the mass outside the head is exact even if it is 1e-30. With e(v) = exp((z(v) - m) / T), and g the derivative
    of the soft part D with respect to log q_T of each entry:
    d D / d z(v) = (g(v) - sum(g) q_T(v)) / T, and for the bucket of the rest also + g(rest) q_T(v) / q_T(rest) / T.
    """
    alpha, t = settings.alpha, settings.temperature if labels is not None else 1.0
    gold_1 = gold[:, None]
    z_gold = z.gather(1, gold_1)
    ids = labels.ids if labels is not None else gold_1[:, :0]
    z_ids = z.gather(1, ids)
    k = labels.head_size if labels is not None else 0
    z.scatter_(1, ids[:, :k], -torch.inf)
    terms = _softmax_terms_(z, z_ids[:, :k], t, scratch)
    hard = terms.lse_1 - z_gold

    g, g_sum, g_rest = torch.zeros_like(z_ids), torch.zeros_like(terms.m), torch.zeros_like(terms.m)
    soft = student_mass = torch.zeros_like(z_gold[:, 0])
    if labels is not None:
        log_q, log_q_rest = z_ids / t - terms.lse, terms.log_rest - terms.lse
        soft, g, g_rest = _divergence_and_grad(log_q, log_q_rest, labels, settings, k == z.shape[1])
        g_sum = g.sum(1, keepdim=True) + g_rest
        student_mass = log_q[:, :k].exp().sum(1)

    if differentiate:
        factor = (1.0 - alpha) * t
        rest = terms.rest.clamp_min(torch.finfo(z.dtype).tiny)
        soft_factor = factor * (g_rest / rest - g_sum * (terms.m / t - terms.lse).exp())
        _softmax_grad_(z, terms, alpha * (terms.m - terms.lse_1).exp(), soft_factor, t, scratch)
        head_grad = alpha * (z_ids[:, :k] - terms.lse_1).exp() - factor * g_sum * (z_ids[:, :k] / t - terms.lse).exp()
        z.scatter_(1, ids[:, :k], head_grad)
        z.scatter_add_(1, ids, factor * g)
        z.scatter_add_(1, gold_1, torch.full_like(z_gold, -alpha))

    hard_sum, soft_sum = hard.sum(), t * t * soft.sum()
    teacher_mass = -torch.expm1(labels.log_rest).sum() if labels is not None else student_mass.sum()
    total = alpha * hard_sum + (1.0 - alpha) * soft_sum
    return torch.stack([total, hard_sum, soft_sum, teacher_mass.to(total.dtype), student_mass.sum()])


def _own_loss_and_grad_(
    z: Tensor, gold: Tensor, labels: SoftLabels[Tensor] | Tensor, settings: LossSettings, differentiate: bool
) -> Tensor:
    """Return the five sums of LossSums (5,) of a loss of one's own; logits z (n, V) become their gradient if asked."""
    with torch.set_grad_enabled(differentiate):
        logits = z.detach().requires_grad_(differentiate)
        sums = distillation_loss(logits, gold, labels, settings)
        if differentiate:
            (grad,) = torch.autograd.grad(sums.total, logits)
            z.copy_(grad)
    return torch.stack([part.detach().to(z.dtype) for part in sums[:5] if part is not None])
