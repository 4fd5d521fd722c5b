"""The fused loss against the plain one in float64, values and all gradients, and against finite differences."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.cache.labels import SoftLabels, soft_labels
from logitcask.pipeline.models import fused_loss as fused
from logitcask.pipeline.models.dense.rows import TeacherRows
from logitcask.pipeline.models.fused_loss import Target, fused_loss
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.models.losses import DIVERGENCES, LossSettings, LossSums, distillation_loss
from tests.models.test_losses import TEMPERATURES, as_tensors, label, random_logits

N, H, V, K, M = 37, 6, 29, 4, 5
SUMS = ("total", "hard", "soft", "teacher_mass", "student_mass")
TAILS = [("sampled", "forward-kl"), ("renormalize", "forward-kl")]
TAILS += [("bucket", divergence) for divergence in DIVERGENCES]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several slices of several chunks each, the last ones shorter."""
    monkeypatch.setattr(fused, "SLICE_LOGITS", 16 * V)
    monkeypatch.setattr(fused, "CACHED_LOGITS", 3 * V)


def inputs(bias: bool = False, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(N, H), (V, H)] + [(V,)] * bias
    tensors = [(torch.randn(shape, generator=random, dtype=torch.float64) * spread).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in tensors]


def gold() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def labels(t: float, tail: str, head: int = K, draws: int = M, spread: float = 2.0) -> SoftLabels[Tensor]:
    return as_tensors(soft_labels(label(random_logits(N, V, spread, 3), head, draws), TEMPERATURES, t, tail))


def head_of(tensors: list[Tensor], scale: float = 1.0, softcap: float | None = None) -> LMHead:
    return LMHead(tensors[1], tensors[2] if len(tensors) > 2 else None, scale, softcap)


def plain(tensors: list[Tensor], head: LMHead, target: SoftLabels[Tensor] | None, how: LossSettings) -> LossSums:
    return distillation_loss(head.logits(tensors[0]), gold(), target, how)


def gradients(total: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total * 0.37, tensors))  # scaled, as a mean over positions would be


def assert_equal(mine: LossSums, reference: LossSums, tensors: list[Tensor], **tolerance: Any) -> None:
    for name in SUMS:
        torch.testing.assert_close(getattr(mine, name), getattr(reference, name), **tolerance)
    for one, other in zip(gradients(mine.total, tensors), gradients(reference.total, tensors), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("tail", "divergence"), TAILS)
def test_equals_the_plain_loss(t: float, alpha: float, tail: str, divergence: str) -> None:
    how, tensors, target = LossSettings(alpha, t, tail, divergence), inputs(), labels(t, tail)
    head = head_of(tensors)
    reference = plain(tensors, head, target, how)
    assert_equal(fused_loss(tensors[0], head, gold(), target, how), reference, tensors)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("t", [1.0, 1.5, 2.0])
def test_heads_with_bias_scale_and_softcap(scale: float, softcap: float | None, bias: bool, t: float) -> None:
    how, tensors, target = LossSettings(0.4, t, "sampled", "forward-kl"), inputs(bias), labels(t, "sampled")
    head = head_of(tensors, scale, softcap)
    assert_equal(fused_loss(tensors[0], head, gold(), target, how), plain(tensors, head, target, how), tensors)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("tail", "divergence"), TAILS)
def test_finite_differences(tail: str, divergence: str, softcap: float | None) -> None:
    how, tensors, target = LossSettings(0.3, 1.5, tail, divergence), inputs(bias=True), labels(1.5, tail)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_loss(hidden, LMHead(weight, bias, 0.7, softcap), gold(), target, how).total

    assert torch.autograd.gradcheck(total, tuple(tensors), fast_mode=True)


def test_without_labels_it_is_cross_entropy() -> None:
    how, tensors = LossSettings(1.0, 2.0, "sampled", "forward-kl"), inputs()
    head = head_of(tensors)
    mine = fused_loss(tensors[0], head, gold(), None, how)
    assert_equal(mine, plain(tensors, head, None, how), tensors)
    expected = torch.nn.functional.cross_entropy(head.logits(tensors[0]), gold(), reduction="sum")
    torch.testing.assert_close(mine.total, expected)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("tail", "divergence"), TAILS)
def test_the_whole_vocabulary_as_head(t: float, tail: str, divergence: str) -> None:
    how, tensors = LossSettings(0.5, t, tail, divergence), inputs()
    head, target = head_of(tensors), labels(t, tail, head=V, draws=0)
    assert_equal(fused_loss(tensors[0], head, gold(), target, how), plain(tensors, head, target, how), tensors)


@pytest.mark.parametrize(("tail", "head", "draws"), [("sampled", 0, 12), ("bucket", K, 0), ("renormalize", K, 0)])
def test_labels_of_draws_only_and_of_a_head_only(tail: str, head: int, draws: int) -> None:
    how, tensors, target = LossSettings(0.5, 2.0, tail, "forward-kl"), inputs(), labels(2.0, tail, head, draws)
    at = head_of(tensors)
    assert_equal(fused_loss(tensors[0], at, gold(), target, how), plain(tensors, at, target, how), tensors)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("spread", [1e-3, 12.0])
@pytest.mark.parametrize(("tail", "divergence"), TAILS)
def test_flat_and_near_certain_students_and_teachers(t: float, spread: float, tail: str, divergence: str) -> None:
    """Logits in the hundreds: almost all mass on one token, the rest too small for float32 to represent beside it."""
    how = LossSettings(0.5, t, tail, divergence)
    tensors, target = inputs(spread=spread), labels(t, tail, spread=spread)
    head = head_of(tensors)
    reference = plain(tensors, head, target, how)
    assert torch.isfinite(reference.total)
    narrow = [x.detach().float().requires_grad_() for x in tensors]
    mine = fused_loss(narrow[0], head_of(narrow), gold(), target, how)
    torch.testing.assert_close(mine.total.double(), reference.total, rtol=1e-5, atol=1e-4)
    for one, other in zip(gradients(mine.total, narrow), gradients(reference.total, tensors), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "autocast"),
    [
        (torch.float32, 2e-6, False),
        *((torch.bfloat16, 0.02, on) for on in (False, True)),
        *((torch.float16, 3e-3, on) for on in (False, True)),
    ],
)
def test_narrow_inputs(dtype: torch.dtype, tolerance: float, autocast: bool) -> None:
    """Errors are relative to the largest entry; the reference is float64 with the same rounded inputs."""
    how, target = LossSettings(0.5, 2.0, "sampled", "forward-kl"), labels(2.0, "sampled")
    rounded = [x.detach().to(dtype) for x in inputs(bias=True)]
    exact = [x.double().requires_grad_() for x in rounded]
    given = [(x.float() if autocast else x).requires_grad_() for x in rounded]
    with torch.autocast("cpu", dtype=dtype if autocast else torch.bfloat16, enabled=autocast):
        mine = fused_loss(given[0], head_of(given), gold(), target, how)
    reference = plain(exact, head_of(exact), target, how)
    assert mine.total.dtype == torch.float32
    torch.testing.assert_close(mine.total.double(), reference.total, rtol=tolerance, atol=0)
    for one, other in zip(gradients(mine.total, given), gradients(reference.total, exact), strict=True):
        assert one.dtype == given[0].dtype
        assert float((one.double() - other).abs().max() / other.abs().max()) < tolerance


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("beyond", [0, 5])
def test_a_teacher_in_memory_is_exact_distillation(t: float, beyond: int) -> None:
    """The dense target equals a label whose head is the whole vocabulary of tokens."""
    how, tensors = LossSettings(0.3, t, "renormalize", "forward-kl"), inputs()
    teacher, tokens = [x.detach() * 1.3 + 0.1 for x in inputs()], V - beyond
    z = head_of(teacher).logits(teacher[0])[:, :tokens].numpy()
    whole = as_tensors(soft_labels(label(z, tokens, 0), TEMPERATURES, t, "renormalize"))
    online: Target = TeacherRows(teacher[0], head_of(teacher), tokens)
    mine = fused_loss(tensors[0], head_of(tensors), gold(), online, how)
    reference = plain(tensors, head_of(tensors), whole, how)
    for name in ("total", "hard", "soft"):
        torch.testing.assert_close(getattr(mine, name), getattr(reference, name), rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(mine.total, tensors), gradients(reference.total, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # label() keeps float32


def test_frozen_tensors_get_no_gradient() -> None:
    how, tensors, target = LossSettings(0.5, 2.0, "sampled", "forward-kl"), inputs(), labels(2.0, "sampled")
    frozen = tensors[1].detach()
    mine = fused_loss(tensors[0], LMHead(frozen, None, 1.0, None), gold(), target, how)
    (gradient,) = gradients(mine.total, tensors[:1])
    reference = plain(tensors, head_of(tensors), target, how)
    torch.testing.assert_close(gradient, gradients(reference.total, tensors)[0])
    with torch.no_grad():
        silent = fused_loss(tensors[0], head_of(tensors), gold(), target, how)
    assert not silent.total.requires_grad
    torch.testing.assert_close(silent.total, mine.total.detach())


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    how, tensors, target = LossSettings(0.5, 2.0, "sampled", "forward-kl"), inputs(), labels(2.0, "sampled")
    total = fused_loss(tensors[0], head_of(tensors), gold(), target, how).total
    expected = gradients(plain(tensors, head_of(tensors), target, how).total, tensors)
    for _ in range(2):
        grads = torch.autograd.grad(total * 0.37, tensors, retain_graph=True)
        torch.testing.assert_close(list(grads), expected)


def test_an_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("_softmax_grad_", "_accumulate"):
        monkeypatch.setattr(fused, name, lambda *_, name=name: called.append(name))
    how, tensors, target = LossSettings(0.5, 2.0, "sampled", "forward-kl"), inputs(), labels(2.0, "sampled")
    with torch.no_grad():
        fused_loss(tensors[0], head_of(tensors), gold(), target, how)
    assert not called
    fused_loss(tensors[0].detach(), head_of([x.detach() for x in tensors]), gold(), target, how)
    assert not called
    fused_loss(tensors[0], head_of(tensors), gold(), target, how)
    assert set(called) == {"_softmax_grad_", "_accumulate"}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("tail", "divergence"), [*TAILS, ("online", "forward-kl")])
def test_an_evaluation_gives_the_same_bits(tail: str, divergence: str, t: float, softcap: float | None) -> None:
    how, tensors = LossSettings(0.3, t, tail, divergence), inputs(dtype=torch.float32)
    teacher = [x.detach() * 1.3 for x in tensors]
    target: Target = TeacherRows(teacher[0], head_of(teacher), V) if tail == "online" else labels(t, tail)
    head = head_of(tensors, 0.7, softcap)
    trained = fused_loss(tensors[0], head, gold(), target, how)
    with torch.no_grad():
        silent = fused_loss(tensors[0], head, gold(), target, how)
    for name in SUMS:
        assert torch.equal(getattr(silent, name), getattr(trained, name).detach()), name


def test_no_target_positions() -> None:
    how, tensors = LossSettings(0.5, 2.0, "sampled", "forward-kl"), inputs()
    none = slice(0, 0)
    mine = fused_loss(tensors[0][none], head_of(tensors), gold()[none], labels(2.0, "sampled")[none], how)
    assert float(mine.total.detach()) == 0.0
    assert all(float(g.abs().sum()) == 0.0 for g in gradients(mine.total, tensors))


def test_values_do_not_depend_on_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    how, tensors, target = LossSettings(0.5, 2.0, "sampled", "forward-kl"), inputs(), labels(2.0, "sampled")
    one = fused_loss(tensors[0], head_of(tensors), gold(), target, how)
    monkeypatch.setattr(fused, "SLICE_LOGITS", 1 << 24)
    monkeypatch.setattr(fused, "CACHED_LOGITS", 1 << 19)
    other = fused_loss(tensors[0], head_of(tensors), gold(), replace(target), how)
    assert_equal(one, other, tensors)
    assert np.isfinite(float(one.total.detach()))
