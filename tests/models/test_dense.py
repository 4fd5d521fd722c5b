"""Losses against whole distributions: the fused ones against dense float64, and what exact labels stand for.

Legend: N positions, W the teacher's width, H the student's, V vocabulary, K tokens of an exact head.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models import fused_loss as fused
from logitcask.pipeline.models.dense.rows import CodedHead, DenseRows, ExactLabels, ExactRows, TeacherRows, log_probs
from logitcask.pipeline.models.fused_loss import fused_loss, fused_position_losses
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.models.losses import DIVERGENCES, LossSettings, distillation_loss
from tests.support.tiny import FloatArray64, dense_log_probs

N, W, H, V, K = 37, 5, 6, 29, 4
TEMPERATURES = (0.7, 1.0, 2.0, 3.3)
ALL = slice(0, N)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several slices of several chunks each, the last ones shorter."""
    monkeypatch.setattr(fused, "SLICE_LOGITS", 16 * V)
    monkeypatch.setattr(fused, "CACHED_LOGITS", 3 * V)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(softcap: float | None = None) -> tuple[list[Tensor], LMHead]:
    tensors = [random(0, N, H).requires_grad_(), random(1, V, H).requires_grad_(), random(2, V).requires_grad_()]
    return tensors, LMHead(tensors[1], tensors[2], 0.7, softcap)


def gold() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))


def teacher(tokens: int = V, spread: float = 1.0) -> TeacherRows:
    """Return a teacher whose vocabulary is padded to V."""
    return TeacherRows(random(4, N, W) * spread, LMHead(random(5, V, W), random(6, V), 1.3, None), tokens)


def exact(rows: TeacherRows, t: float, anchor: float, k: int = K, error: float = 0.0) -> ExactRows:
    """Return a teacher's exact labels, its hidden states changed at random by so much."""
    log_p = log_probs(rows, ALL, 1.0)
    head = log_p.topk(k, dim=1)
    tail = (log_p / anchor).scatter(1, head.indices, -torch.inf).logsumexp(1)
    hidden, source = rows.hidden_NW + error * random(7, N, W), torch.arange(N) % 2
    bases, centres = torch.stack([random(8, W, W), torch.eye(W, dtype=torch.float64)]), random(9, 2, W)
    codes = torch.linalg.solve(bases[source].mT, 2.0 * (hidden - centres[source]))
    steps = torch.full((N,), 0.5, dtype=torch.float64)
    weight, bias = rows.head.weight[: rows.vocab_size], rows.head.bias
    assert bias is not None
    head_read = LMHead(weight, bias[: rows.vocab_size], rows.head.scale, rows.head.softcap)
    coded = CodedHead(head_read, bases, centres)
    arrays = (head.indices, head.values, tail, torch.zeros_like(tail), codes, steps, source)
    labels = ExactLabels(*arrays, t, anchor, lambda device: coded)
    return labels.rows(torch.device("cpu"))


def narrowed(rows: ExactRows) -> ExactRows:
    """Return the same in float32."""
    head, coded = rows.coded.head, rows.coded
    assert head.bias is not None
    narrow = CodedHead(
        LMHead(head.weight.float(), head.bias.float(), head.scale, head.softcap),
        coded.bases_SCW.float(),
        coded.centres_SW.float(),
    )
    return ExactRows(rows.labels.map(lambda x: x.float() if x.is_floating_point() else x), narrow)


def reference(log_p: FloatArray64, log_q: FloatArray64, divergence: str) -> FloatArray64:
    """Return a divergence by its definition, (N,), summed over the tokens that the teacher has."""
    tokens = log_p.shape[1]
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.log(0.5 * (p + q[:, :tokens]))
    beyond = q[:, tokens:].sum(1)  # p = 0 there: m = q / 2
    values: dict[str, FloatArray64] = {
        "forward-kl": (p * (log_p - log_q[:, :tokens])).sum(1),
        "reverse-kl": (q * (log_q - np.pad(log_p, ((0, 0), (0, V - tokens)), constant_values=-64.0))).sum(1),
        "jsd": 0.5 * (p * (log_p - log_m) + q[:, :tokens] * (log_q[:, :tokens] - log_m)).sum(1)
        + 0.5 * beyond * np.log(2.0),
        "tvd": 0.5 * np.abs(p - q[:, :tokens]).sum(1) + 0.5 * beyond,
    }
    return values[divergence]


@pytest.mark.parametrize("tokens", [V, V - 5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_teacher_in_memory(t: float, divergence: str, tokens: int) -> None:
    how, (tensors, head), target = LossSettings(0.3, t, "exact", divergence), student(), teacher(tokens)
    mine = fused_loss(tensors[0], head, gold(), target, how)
    z_teacher = target.head.logits(target.hidden_NW)[:, :tokens].numpy()
    z = head.logits(tensors[0])
    soft = t * t * reference(dense_log_probs(z_teacher, t), dense_log_probs(z.detach().numpy(), t), divergence)
    assert float(mine.soft.detach()) == pytest.approx(float(soft.sum()), rel=1e-9)
    plain = distillation_loss(z, gold(), log_probs(target, ALL, t), how)
    for name in ("total", "hard", "soft", "teacher_mass", "student_mass"):
        torch.testing.assert_close(getattr(mine, name), getattr(plain, name))
    expected = torch.autograd.grad(plain.total, tensors)
    for one, other in zip(torch.autograd.grad(mine.total, tensors), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_finite_differences(divergence: str) -> None:
    (tensors, _), target = student(), teacher()

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        how = LossSettings(0.3, 1.5, "exact", divergence)
        return fused_loss(hidden, LMHead(weight, bias, 0.7, 4.0), gold(), target, how).total

    assert torch.autograd.gradcheck(total, tuple(tensors), fast_mode=True)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("anchor", [1.0, 2.0])
def test_exact_labels_of_true_hidden_states_are_the_teacher(t: float, anchor: float) -> None:
    """At any temperature, whichever one the tail's mass was stored at."""
    for k in (K, V):
        rows = log_probs(exact(teacher(), t, anchor, k), ALL, t)
        torch.testing.assert_close(rows, log_probs(teacher(), ALL, t), rtol=1e-9, atol=1e-9)


def test_coarse_hidden_states_shape_the_tail_alone() -> None:
    """The head and the mass outside it are exact at the anchor, and the probabilities sum to 1 at any temperature."""
    true = log_probs(teacher(), ALL, 2.0)
    label = exact(teacher(), 2.0, 2.0, error=0.5)
    coarse, ids = log_probs(label, ALL, 2.0), label.labels.ids
    torch.testing.assert_close(coarse.gather(1, ids), true.gather(1, ids))
    assert float((coarse - true).abs().max()) > 0.1
    for t in TEMPERATURES:
        total = log_probs(exact(teacher(), t, 2.0, error=0.5), ALL, t).exp().sum(1)
        torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reverse_kl_alone_is_taken_without_the_bias_of_tails(t: float, divergence: str) -> None:
    """Of labels whose tails are too high or too low, and that say by how much, it is that of the teacher."""
    (tensors, head), how, bias = student(), LossSettings(0.2, t, "exact", divergence), random(10, N)
    right = exact(teacher(), t, t)
    labels = replace(right.labels, log_tail=right.labels.log_tail + bias)
    as_it_is, known = replace(right, labels=labels), replace(right, labels=replace(labels, tail_bias=bias))
    expected = fused_loss(tensors[0], head, gold(), right if divergence == "reverse-kl" else as_it_is, how).total
    mine = fused_loss(tensors[0], head, gold(), known, how).total
    apart = fused_position_losses(tensors[0], head, gold(), known, how).sum()
    for total in (mine, apart):
        torch.testing.assert_close(total, expected)
        for one, other in zip(
            *(torch.autograd.grad(x, tensors, retain_graph=True) for x in (total, expected)), strict=True
        ):
            torch.testing.assert_close(one, other)
    other_way = fused_loss(tensors[0], head, gold(), as_it_is if divergence == "reverse-kl" else right, how).total
    assert abs(float((other_way - mine).detach())) > 1e-3


def test_a_tail_of_next_to_no_mass_stays_finite() -> None:
    for t in (0.05, 1.0):
        narrow = narrowed(exact(teacher(spread=40.0), t, 1.0))
        how, (tensors, head) = LossSettings(0.0, t, "exact", "reverse-kl"), student()
        total = fused_loss(tensors[0], head, gold(), narrow, how).total
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(total, tensors))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_exact_rows_in_float32(divergence: str) -> None:
    how, (tensors, head), target = LossSettings(0.1, 2.0, "exact", divergence), student(), exact(teacher(), 2.0, 1.0)
    expected = torch.autograd.grad(fused_loss(tensors[0], head, gold(), target, how).total, tensors)
    narrow = [x.detach().float().requires_grad_() for x in tensors]
    mine = fused_loss(narrow[0], LMHead(narrow[1], narrow[2], 0.7, None), gold(), narrowed(target), how)
    for one, other in zip(torch.autograd.grad(mine.total, narrow), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_autocast_leaves_exact_labels_alone() -> None:
    narrow = narrowed(exact(teacher(), 2.0, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_probs(narrow, ALL, 2.0)
    torch.testing.assert_close(inside, log_probs(narrow, ALL, 2.0), rtol=0.0, atol=0.0)


def skewed(logits: Tensor, labels: SoftLabels[Tensor]) -> Tensor:
    """Return KL(p || (p + 9 q) / 10) at T, from the entries of any kind of label."""
    log_q = torch.log_softmax(logits / labels.temperature, dim=1).gather(1, labels.ids)
    mixed = torch.logaddexp(labels.log_probs + np.log(0.1), log_q + np.log(0.9))
    return (labels.weights * (labels.log_probs - mixed)).sum(1)


def test_a_loss_of_ones_own_gets_the_whole_distribution() -> None:
    how, (tensors, head) = LossSettings(0.0, 1.5, "exact", "forward-kl", skewed), student()
    targets: list[DenseRows] = [teacher(), exact(teacher(), 1.5, 2.0)]
    log_q = torch.log_softmax(head.logits(tensors[0]) / 1.5, dim=1)
    log_p = log_probs(teacher(), ALL, 1.5)
    expected = (log_p.exp() * (log_p - torch.log(0.1 * log_p.exp() + 0.9 * log_q.exp()))).sum()
    gradients = torch.autograd.grad(expected, tensors)
    for target in targets:
        mine = fused_loss(tensors[0], head, gold(), target, how)
        assert float(mine.soft.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        for one, other in zip(torch.autograd.grad(mine.total, tensors), gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_per_position_add_up(divergence: str) -> None:
    how, (tensors, head), target = LossSettings(0.2, 2.0, "exact", divergence), student(), exact(teacher(), 2.0, 1.0)
    losses = fused_position_losses(tensors[0], head, gold(), target, how)
    total = fused_loss(tensors[0], head, gold(), target, how).total
    torch.testing.assert_close(losses.sum(), total)
    expected = torch.autograd.grad(total, tensors)
    for one, other in zip(torch.autograd.grad(losses.sum(), tensors), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_own_loss_that_fails_is_one_line() -> None:
    def broken(logits: Tensor, labels: SoftLabels[Tensor]) -> Tensor:
        return logits.sum()

    how, (tensors, head) = LossSettings(0.0, 1.0, "exact", "forward-kl", broken), student()
    with pytest.raises(LogitcaskError, match="must return one loss per position"):
        fused_loss(tensors[0], head, gold(), teacher(), how)
