"""Distillation losses: the plain reference implementation, one line of code per line of mathematics.

Legend: N target positions, V vocabulary, S entries of a sparse label, the first K of them its head, O outcomes.
Log-probabilities are in nats; every loss is per position, shape (N,). KL is forward, KL(teacher || student), unless
named otherwise. At the end, the term that a mixture-of-experts student adds of its own.
"""

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import MASS_FLOOR, SoftLabels

# A soft loss of one's own: the student's logits (n, V) of some positions at T=1, in float32 or wider, and the labels of
# the same n positions; it returns one loss per position, (n,), used as it is in place of T^2 * KL.
OwnLoss = Callable[[Tensor, SoftLabels[Tensor]], Tensor]


DIVERGENCES = ("forward-kl", "reverse-kl", "jsd", "tvd")


@dataclass(frozen=True)
class LossSettings:
    """The loss to compute: alpha * hard + (1 - alpha) * soft, where soft is T^2 * divergence or a loss of one's own."""

    alpha: float
    temperature: float
    tail: str  # sampled, bucket, renormalize
    divergence: str  # one of DIVERGENCES
    own: OwnLoss | None = None


class LossSums(NamedTuple):
    """Sums over target positions, so that dividing by their number gives a mean per position over any grouping.

    A tuple, because DDP and FSDP look for tensors in what ``forward`` returns.
    """

    total: Tensor  # differentiable
    hard: Tensor
    soft: Tensor
    teacher_mass: Tensor  # the teacher's probability of the head's tokens, at T
    student_mass: Tensor  # the student's probability of the same tokens, at T
    aux: Tensor | None = None  # the router loss times the number of positions; part of ``total``


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
    if divergence == "tvd":
        return 0.5 * (log_p_NO.exp() - log_q_NO.exp()).abs().sum(1)
    assert divergence == "jsd", divergence
    log_m_NO = torch.logaddexp(log_p_NO, log_q_NO) - math.log(2.0)
    sides = [
        functional.kl_div(log_m_NO, side, reduction="none", log_target=True).sum(1) for side in (log_p_NO, log_q_NO)
    ]
    return 0.5 * (sides[0] + sides[1])


def dense_divergence(log_q_NV: Tensor, log_p_Nv: Tensor, divergence: str) -> Tensor:
    """Return the divergence (N,) from a teacher whose whole distribution is known, over its tokens v.

    Those that the student has beyond them get next to no probability, not none, so that the reverse KL stays finite.
    """
    beyond = log_q_NV.shape[1] - log_p_Nv.shape[1]
    return outcome_divergence(log_q_NV, functional.pad(log_p_Nv, (0, beyond), value=MASS_FLOOR), divergence)


def whole_labels(log_p_Nv: Tensor, temperature: float) -> SoftLabels[Tensor]:
    """Return a whole distribution as labels, for a loss of one's own: their head is the vocabulary."""
    ids = torch.arange(log_p_Nv.shape[1], device=log_p_Nv.device).expand_as(log_p_Nv)
    rest = log_p_Nv.new_full((len(log_p_Nv),), MASS_FLOOR)
    return SoftLabels(ids, log_p_Nv.exp(), log_p_Nv, rest, log_p_Nv.shape[1], temperature, "renormalize")


def soft_loss(log_q_NV: Tensor, labels: SoftLabels[Tensor] | Tensor, settings: LossSettings) -> Tensor:
    """Return T^2 times the divergence at T, (N,). T^2 keeps gradients about equal over T (Hinton et al., 2015)."""
    if isinstance(labels, Tensor):
        divergence_N = dense_divergence(log_q_NV, labels, settings.divergence)
    elif settings.tail == "bucket":
        divergence_N = bucket_divergence(log_q_NV, labels, settings.divergence)
    else:
        assert settings.divergence == "forward-kl", "only the bucket tail allows other divergences"
        divergence_N = sparse_forward_kl(log_q_NV, labels)
    return settings.temperature**2 * divergence_N


def own_loss(function: OwnLoss, logits_NV: Tensor, labels: SoftLabels[Tensor]) -> Tensor:
    """Return a user's loss per position, (N,). Raises LogitcaskError if it fails or returns anything else."""
    name = f"{function.__module__}:{function.__qualname__}" if hasattr(function, "__qualname__") else repr(function)
    try:
        loss_N = function(logits_NV, labels)
    except (LogitcaskError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        raise LogitcaskError(f"loss {name}: {type(error).__name__}: {message} ({at.filename}:{at.lineno})") from error
    rule = f"loss {name}: must return one loss per position, a tensor of shape ({len(logits_NV)},)"
    if not isinstance(loss_N, Tensor):
        raise LogitcaskError(f"{rule}, got {type(loss_N).__name__}")
    if loss_N.shape != logits_NV.shape[:1]:
        raise LogitcaskError(f"{rule}, got {tuple(loss_N.shape)}")
    if logits_NV.requires_grad and not loss_N.requires_grad:
        raise LogitcaskError(f"loss {name}: does not depend on the logits: use them without detach() or no_grad()")
    return loss_N


def load_loss(name: str) -> OwnLoss:
    """Return the function that ``module:function`` names; modules of the working folder are found, too.

    Raises LogitcaskError if there is none.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise LogitcaskError(f"--loss must be module:function, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        message = " ".join(str(error).split())
        raise LogitcaskError(
            f"--loss {name}: cannot import {module_name}: {type(error).__name__}: {message}: run in the folder of "
            f"{module_name.partition('.')[0]}.py, or install it"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    function: OwnLoss | None = getattr(module, function_name, None)
    if not callable(function):
        raise LogitcaskError(f"--loss {name}: {module.__file__} has no function {function_name}")
    return function


def position_losses(
    logits_NV: Tensor, gold_N: Tensor, labels: SoftLabels[Tensor] | Tensor | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha * hard + (1 - alpha) * soft, hard and soft per position, each (N,); without labels soft is 0.

    A tensor as ``labels`` holds log p_T of the teacher's whole distribution, (N, tokens).
    """
    hard_N = hard_loss(logits_NV, gold_N)
    if labels is None:
        return settings.alpha * hard_N, hard_N, torch.zeros_like(hard_N)
    if settings.own is not None:
        whole = whole_labels(labels, settings.temperature) if isinstance(labels, Tensor) else labels
        soft_N = own_loss(settings.own, logits_NV, whole)
    else:
        soft_N = soft_loss(functional.log_softmax(logits_NV / settings.temperature, dim=1), labels, settings)
    return settings.alpha * hard_N + (1.0 - settings.alpha) * soft_N, hard_N, soft_N


def distillation_loss(
    logits_NV: Tensor, gold_N: Tensor, labels: SoftLabels[Tensor] | Tensor | None, settings: LossSettings
) -> LossSums:
    """Return alpha * hard + (1 - alpha) * soft, summed over positions. ``labels`` may be None if alpha is 1."""
    total_N, hard_N, soft_N = position_losses(logits_NV, gold_N, labels, settings)
    zero = hard_N.new_zeros(())
    if labels is None:
        return LossSums(total_N.sum(), hard_N.detach().sum(), zero, zero, zero)
    if isinstance(labels, Tensor):
        mass = torch.ones_like(hard_N).detach().sum()
        return LossSums(total_N.sum(), hard_N.detach().sum(), soft_N.detach().sum(), mass, mass)
    with torch.no_grad():
        log_q_NV = functional.log_softmax(logits_NV / settings.temperature, dim=1)
    return LossSums(
        total=total_N.sum(),
        hard=hard_N.detach().sum(),
        soft=soft_N.detach().sum(),
        teacher_mass=(-torch.expm1(labels.log_rest)).sum(),
        student_mass=log_q_NV.gather(1, labels.ids[:, : labels.head_size]).exp().sum(),
    )


@dataclass(frozen=True)
class RouterLoss:
    """The term that keeps the experts of a mixture-of-experts model equally busy, by the architecture's own function.

    Fedus et al. (2022), Switch Transformers, equations 4 to 6.
    """

    coefficient: float
    function: Callable[..., Tensor]
    experts: int
    active: int  # experts per token

    def __call__(self, router_logits: tuple[Tensor, ...], tokens_RL: Tensor | None) -> Tensor:
        """Return the loss () before its coefficient, over the places (R, L) that hold tokens; None: all do."""
        return self.function(router_logits, self.experts, self.active, tokens_RL)


def read_router_loss(model: PreTrainedModel, coefficient: float | None) -> RouterLoss | None:
    """Return a model's router loss, None if it has none or its config leaves it out.

    ``coefficient`` replaces that of the config and its output_router_logits; 0 turns the loss off. Raises
    LogitcaskError if one is given for a model without experts, or the loss is not a function of router logits alone.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if function is None:
        if coefficient:
            raise LogitcaskError(f"--router-aux-loss-coef {coefficient:g}: {name} has no router loss: leave it out")
        return None
    if coefficient is None:
        names = ("router_aux_loss_coef", "aux_loss_coef")
        own = (getattr(owner, name, None) for owner in (model, config) for name in names)
        coefficient = next((value for value in own if value is not None), 0.0) if returns_router_logits(model) else 0.0
    if not coefficient:
        return None
    probe = _probe(model)
    experts, active = (
        next((v for owner in (model, config) for n in names if (v := getattr(owner, n, None)) is not None), 0)
        for names in (("num_experts", "num_local_experts"), ("num_experts_per_tok",))
    )
    loss, was_training = RouterLoss(coefficient, function, experts, active), model.training
    model.eval()  # some routers add noise in training
    try:
        with torch.no_grad():
            expected = model(input_ids=probe, output_router_logits=True).aux_loss
            logits = model.base_model(input_ids=probe, use_cache=False, output_router_logits=True).router_logits
            same = torch.allclose(loss(logits, None), expected, rtol=1e-4)
    except Exception:  # its forward takes or gives something else
        same = False
    model.train(was_training)
    if not same:
        raise LogitcaskError(
            f"{name}: its router loss is computed from more than its router logits, which is not supported: train "
            "without it by --router-aux-loss-coef 0, or choose another architecture"
        )
    return loss


def returns_router_logits(model: PreTrainedModel) -> bool:
    """Return whether a model's config asks for router logits, and so for the router loss."""
    configs = (model.config, model.config.get_text_config())
    return any(bool(getattr(config, "output_router_logits", False)) for config in configs)


@torch.no_grad()
def require_known_loss(model: PreTrainedModel) -> None:
    """Raise LogitcaskError if a model's own training loss is not cross-entropy, with or without the router loss."""
    was_training = model.training
    model.eval()
    probe = _probe(model)
    try:
        outputs = model(input_ids=probe, labels=probe)
        own: Tensor | None = outputs.loss
    except (TypeError, ValueError):  # it has no loss of its own
        own = None
    model.train(was_training)
    if own is None:
        return
    logits, gold = outputs.logits[0].float(), probe[0]
    plain = functional.cross_entropy(logits[:-1], gold[1:]), functional.cross_entropy(logits, gold)
    router = read_router_loss(model, None)
    term = router.coefficient * outputs.aux_loss if router is not None else 0.0
    if min(abs(float(own - loss - term)) for loss in plain) > 1e-3 * max(1.0, abs(float(own))):
        raise LogitcaskError(
            f"{type(model).__name__}: not supported: its own training loss is {float(own):.4f} where the cross-entropy "
            f"is {float(plain[0]):.4f}: set the coefficients of what its config adds to 0"
        )


def _probe(model: PreTrainedModel) -> Tensor:
    embeddings = model.get_input_embeddings()
    ids: Tensor = torch.arange(1, 9, device=embeddings.weight.device)[None] % len(embeddings.weight)
    return ids
