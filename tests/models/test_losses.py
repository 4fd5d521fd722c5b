"""Sparse labels and their losses against dense float64 KD.

Legend: N positions, V vocabulary, S label entries, z logits, T temperature, J stored temperatures.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import SoftLabels, SparseTargets, soft_labels
from logitcask.cache.layout import decode_targets, encode_targets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.losses import (
    LossSettings,
    bucket_divergence,
    distillation_loss,
    soft_loss,
    sparse_forward_kl,
)
from logitcask.pipeline.teachers.sparsify import _top, sparsify, uniform_draws
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.support.tiny import FloatArray64, dense_kd_gradient, dense_log_probs, make_teacher

TEMPERATURES = (1.0, 1.5, 2.0)
quick = settings(
    deadline=None, max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random_logits(rows: int, vocab: int, spread: float, seed: int) -> FloatArray64:
    return np.random.default_rng(seed).normal(0.0, spread, (rows, vocab))


def label(z_NV: FloatArray64, head: int, draws: int, *, seed: int = 0, gold: int = 0) -> SparseTargets:
    n = len(z_NV)
    uniforms = torch.from_numpy(uniform_draws(seed, 0, n, draws))
    return sparsify(torch.from_numpy(z_NV), torch.full((n,), gold), uniforms, head, TEMPERATURES)


def as_tensors(soft: SoftLabels[Any]) -> SoftLabels[Tensor]:
    """Convert to tensors, in float64 except for the ids."""
    return soft.map(torch.from_numpy).map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def exact_labels(z_NV: FloatArray64, head: int, t: float) -> SoftLabels[Tensor]:
    """Return a label's head and rest at T in float64, from the dense distribution."""
    p_NV = dense_log_probs(z_NV, t)
    ids = np.argsort(-z_NV, axis=1, kind="stable")[:, :head]
    log_p = np.take_along_axis(p_NV, ids, axis=1)
    rest = np.maximum(1.0 - np.exp(log_p).sum(1), 1e-300)
    ids_NK, weights_NK, log_p_NK, log_rest_N = (torch.from_numpy(a) for a in (ids, np.exp(log_p), log_p, np.log(rest)))
    return SoftLabels(ids_NK, weights_NK, log_p_NK, log_rest_N, head)


def kd_gradient(
    student_NV: FloatArray64, labels: SoftLabels[Tensor], t: float, tail: str, alpha: float = 0.0
) -> FloatArray64:
    z = torch.from_numpy(student_NV).clone().requires_grad_()
    how = LossSettings(alpha=alpha, temperature=t, tail=tail, divergence="forward-kl")
    distillation_loss(z, torch.zeros(len(z), dtype=torch.long), labels, how).total.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    gradient: FloatArray64 = z.grad.numpy()
    return gradient


def outcomes(log_NV: FloatArray64, ids_NK: Tensor) -> FloatArray64:
    """Return the probabilities of the head's tokens and, last, of everything else."""
    p = np.exp(log_NV)
    head = np.take_along_axis(p, ids_NK.numpy(), axis=1)
    return np.concatenate([head, (p.sum(1) - head.sum(1))[:, None]], axis=1)


@quick
@given(st.integers(1, 4), st.integers(2, 40), st.floats(0.1, 5.0), st.sampled_from(TEMPERATURES), st.integers(0, 99))
def test_the_whole_vocabulary_as_head_is_dense_kd(rows: int, vocab: int, spread: float, t: float, seed: int) -> None:
    teacher, student = random_logits(rows, vocab, spread, seed), random_logits(rows, vocab, 1.0, seed + 1000)
    p, q = dense_log_probs(teacher, t), dense_log_probs(student, t)
    how = LossSettings(alpha=0.0, temperature=t, tail="sampled", divergence="forward-kl")
    labels = exact_labels(teacher, vocab, t)
    gold = torch.zeros(rows, dtype=torch.long)
    for tail in ("sampled", "renormalize", "bucket"):
        sums = distillation_loss(torch.from_numpy(student), gold, labels, replace(how, tail=tail))
        dense = t * t * (np.exp(p) * (p - q)).sum()
        assert float(sums.total) == pytest.approx(dense, rel=1e-6)
        gradient = kd_gradient(student, labels, t, tail)
        np.testing.assert_allclose(gradient, dense_kd_gradient(teacher, student, t), rtol=1e-6, atol=1e-9)


@quick
@given(st.integers(2, 40), st.floats(0.1, 5.0), st.sampled_from(TEMPERATURES), st.integers(0, 99))
def test_the_real_path_with_the_whole_vocabulary_is_dense_kd_in_float32(
    vocab: int, spread: float, t: float, seed: int
) -> None:
    teacher, student = random_logits(3, vocab, spread, seed), random_logits(3, vocab, 1.0, seed + 1000)
    labels = as_tensors(soft_labels(label(teacher, vocab, 0), TEMPERATURES, t, "sampled"))
    gradient = kd_gradient(student, labels, t, "sampled")
    np.testing.assert_allclose(gradient, dense_kd_gradient(teacher, student, t), rtol=1e-4, atol=3e-6)


@settings(quick, max_examples=12)
@given(
    st.integers(20, 700),
    st.integers(0, 12),
    st.integers(1, 40),
    st.floats(0.05, 6.0),
    st.sampled_from(TEMPERATURES),
    st.integers(0, 999),
)
def test_sampled_labels_are_unbiased(vocab: int, head: int, draws: int, spread: float, t: float, seed: int) -> None:
    """The mean over many labels of one teacher is the dense gradient, within the standard error of the draws."""
    teacher, student = random_logits(1, vocab, spread, seed), random_logits(1, vocab, 1.0, seed + 1000)
    dense = dense_kd_gradient(teacher, student, t)[0]
    direction = np.random.default_rng(seed).normal(size=vocab)
    rows = 3000
    soft = soft_labels(label(np.repeat(teacher, rows, 0), head, draws, seed=seed), TEMPERATURES, t, "sampled")
    q = np.exp(dense_log_probs(student, t))[0]
    # T (q sum_s w_s - sum_s w_s e_s), the gradient of one label, projected on a random direction and on p - q
    for f in (direction, dense / np.abs(dense).max()):
        along = t * (soft.weights * ((q @ f) - f[soft.ids])).sum(1)
        error, scale = along.mean() - dense @ f, along.std() / math.sqrt(rows)
        assert abs(error) < 5 * scale + 2e-5 * max(1.0, abs(dense @ f))


def test_the_loss_of_sampled_labels_has_the_gradient_of_their_weights() -> None:
    teacher, student = random_logits(5, 60, 2.0, 1), random_logits(5, 60, 1.0, 2)
    labels = as_tensors(soft_labels(label(teacher, 4, 9), TEMPERATURES, 1.5, "sampled"))
    q = np.exp(dense_log_probs(student, 1.5))
    want = q * labels.weights.sum(1, keepdim=True).numpy()
    for row in range(5):
        np.subtract.at(want[row], labels.ids[row].numpy(), labels.weights[row].numpy())
    np.testing.assert_allclose(kd_gradient(student, labels, 1.5, "sampled"), 1.5 * want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["heavy tail", "light tail"])
def test_the_error_falls_as_one_over_the_root_of_the_draws(t: float, spread: float) -> None:
    teacher, student = random_logits(1, 400, spread, 3), random_logits(1, 400, 1.0, 4)
    dense, q = dense_kd_gradient(teacher, student, t)[0], np.exp(dense_log_probs(student, t))[0]

    def error(labels: int, trial: int) -> float:
        soft = soft_labels(label(np.repeat(teacher, labels, 0), 4, 8, seed=trial), TEMPERATURES, t, "sampled")
        mean = np.bincount(soft.ids.ravel(), soft.weights.ravel(), minlength=400) / labels
        return float(np.linalg.norm(t * (q * mean.sum() - mean) - dense))

    few, many = (np.mean([error(n, trial) for trial in range(10)]) for n in (40, 2560))
    assert 8.0 * 0.7 < few / many < 8.0 * 1.4


@pytest.mark.parametrize("mass", [1e-7, 1e-30, 0.0])
@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_near_certain_teacher_has_finite_unbiased_weights(mass: float, t: float) -> None:
    vocab, head, draws, rows = 300, 1, 8, 3000
    z = np.zeros((1, vocab))
    z[0, 1:] = np.linspace(0.0, 3.0, vocab - 1)
    gap = np.log(np.exp(z[0, 1:]).sum()) - math.log(mass) if mass else math.inf
    if mass:
        z[0, 0] = gap
    else:
        z[0, 1:] = -math.inf
    targets = label(np.repeat(z, rows, 0), head, draws, seed=7)
    soft = soft_labels(targets, TEMPERATURES, t, "sampled")
    assert np.isfinite(soft.weights).all()
    assert np.isfinite(soft.log_probs).all()
    assert np.isfinite(soft.log_rest).all()
    if mass == 0.0:
        np.testing.assert_array_equal(soft.weights[:, 0], 1.0)
        np.testing.assert_array_equal(soft.weights[:, 1:], 0.0)
        np.testing.assert_array_equal(targets.tail_counts, 0)
        assert np.isneginf(targets.log_tail_mass).all()
        return
    p = np.exp(dense_log_probs(z, t))[0]
    np.testing.assert_allclose(
        targets.log_tail_mass[0], [np.log(np.exp(dense_log_probs(z, s))[0, 1:].sum()) for s in TEMPERATURES], rtol=1e-5
    )
    np.testing.assert_allclose(soft.weights[:, 0], p[0], rtol=1e-5)
    f = np.linspace(1.0, 2.0, vocab) / p[1:].sum()  # relative to the tail's mass, or 1e-30 would hide any bias
    along = (soft.weights[:, 1:] * f[soft.ids[:, 1:]]).sum(1, dtype=np.float64)
    assert abs(along.mean() - p[1:] @ f[1:]) < 5 * along.std() / math.sqrt(rows) + 1e-4


@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_flat_teacher_has_finite_unbiased_weights(t: float) -> None:
    vocab, head, draws = 50_000, 8, 24
    targets = label(np.zeros((20, vocab)), head, draws, seed=5)
    soft = soft_labels(targets, TEMPERATURES, t, "sampled")
    np.testing.assert_allclose(soft.weights.sum(1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(soft.weights[:, :head], 1 / vocab, rtol=1e-4)
    np.testing.assert_allclose(targets.log_tail_mass, math.log1p(-head / vocab), atol=1e-6)
    drawn = targets.tail_ids[targets.tail_counts > 0]
    assert abs(drawn.mean() / vocab - 0.5) < 0.07  # 480 draws: five standard errors


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("t", TEMPERATURES)
def test_bucket_is_the_dense_divergence_over_one_more_outcome_than_the_head(divergence: str, t: float) -> None:
    teacher, student = random_logits(4, 30, 2.0, 8), random_logits(4, 30, 1.0, 9)
    labels = exact_labels(teacher, 5, t)
    log_q = torch.from_numpy(dense_log_probs(student, t))
    p, q = (outcomes(dense_log_probs(z, t), labels.ids) for z in (teacher, student))
    m = (p + q) / 2
    want = {
        "forward-kl": (p * np.log(p / q)).sum(1),
        "reverse-kl": (q * np.log(q / p)).sum(1),
        "jsd": ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2,
    }[divergence]
    np.testing.assert_allclose(bucket_divergence(log_q, labels, divergence).numpy(), want, rtol=1e-9)
    z = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bucket_divergence((x / t).log_softmax(1), labels, divergence), (z,))


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jsd"])
def test_bucket_is_finite_for_a_teacher_without_a_tail(divergence: str) -> None:
    z = np.full((1, 20), -np.inf)
    z[0, :2] = 0.0
    labels = as_tensors(soft_labels(label(z, 2, 3), TEMPERATURES, 2.0, "bucket"))
    divergences = bucket_divergence(torch.randn(1, 20, dtype=torch.double).log_softmax(1), labels, divergence)
    assert torch.isfinite(divergences).all()


@pytest.mark.parametrize("tail", ["bucket", "sampled", "renormalize"])
def test_tokens_of_the_head_without_any_probability_add_nothing(tail: str) -> None:
    """Labels in another vocabulary may have them: more tokens in the head than the projection reaches."""
    z, log_q = np.full((1, 20), -np.inf), torch.randn(1, 20, dtype=torch.double).log_softmax(1)
    z[0, :2] = 0.0
    settings = LossSettings(0.0, 1.0, tail, "forward-kl")
    few, many = (
        soft_loss(log_q, as_tensors(soft_labels(label(z, head, 3), TEMPERATURES, 1.0, tail)), settings)
        for head in (2, 6)
    )
    torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_bucket_labels_hold_the_true_remaining_mass(t: float) -> None:
    teacher = random_logits(6, 500, 3.0, 10)
    soft, exact = soft_labels(label(teacher, 6, 4), TEMPERATURES, t, "bucket"), exact_labels(teacher, 6, t)
    np.testing.assert_array_equal(soft.ids, exact.ids.numpy())
    np.testing.assert_allclose(soft.log_rest, exact.log_rest.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(soft.log_probs, exact.log_probs.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_renormalize_is_the_softmax_of_the_tempered_head(t: float) -> None:
    teacher, student = random_logits(4, 100, 2.0, 11), random_logits(4, 100, 1.0, 12)
    soft = soft_labels(label(teacher, 5, 7), TEMPERATURES, t, "renormalize")
    top = -np.sort(-teacher, axis=1)[:, :5] / t
    want = np.exp(top) / np.exp(top).sum(1, keepdims=True)
    np.testing.assert_allclose(soft.weights, want, rtol=1e-5)
    log_q = dense_log_probs(student, t)
    loss = (want * (np.log(want) - np.take_along_axis(log_q, soft.ids, 1))).sum(1)
    np.testing.assert_allclose(sparse_forward_kl(torch.from_numpy(log_q), as_tensors(soft)).numpy(), loss, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", TEMPERATURES)
def test_alpha_and_the_square_of_the_temperature_are_in_the_gradient(alpha: float, t: float) -> None:
    teacher, student = random_logits(3, 25, 2.0, 13), random_logits(3, 25, 1.0, 14)
    hard = np.exp(dense_log_probs(student)) - np.eye(25)[[0, 0, 0]]
    p, q = np.exp(dense_log_probs(teacher, t)), np.exp(dense_log_probs(student, t))
    want = alpha * hard + (1 - alpha) * t**2 * (q - p) / t  # 1 / T is the chain rule through z / T
    gradient = kd_gradient(student, exact_labels(teacher, 25, t), t, "sampled", alpha)
    np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-9)


def test_uniform_draws_depend_on_seed_and_example_only() -> None:
    first = uniform_draws(0, 5, 7, 3)
    np.testing.assert_array_equal(first, uniform_draws(0, 5, 7, 3))
    np.testing.assert_array_equal(first[:4], uniform_draws(0, 5, 4, 3))
    others = [uniform_draws(seed, example, 7, 3) for seed, example in [(1, 5), (0, 6), (5, 0), (0, 0), (2**63 - 1, 5)]]
    assert all((first != other).all() for other in others)
    assert first.min() >= 0.0
    assert first.max() < 1.0


def test_a_temperature_that_is_not_stored_is_refused() -> None:
    with pytest.raises(LogitcaskError, match=r"temperature 3 is not stored.*1, 1\.5, 2"):
        soft_labels(label(random_logits(1, 9, 1.0, 0), 2, 2), TEMPERATURES, 3.0, "sampled")


def test_no_head_and_no_draws() -> None:
    teacher = random_logits(2000, 40, 0.0, 0) + random_logits(1, 40, 2.0, 15)
    only_draws = soft_labels(label(teacher, 0, 16), TEMPERATURES, 2.0, "sampled")
    assert only_draws.head_size == 0
    mean = np.bincount(only_draws.ids.ravel(), only_draws.weights.ravel(), minlength=40) / 2000
    np.testing.assert_allclose(mean, np.exp(dense_log_probs(teacher[:1], 2.0))[0], atol=0.004)
    np.testing.assert_allclose(label(teacher, 0, 16).log_tail_mass, 0.0, atol=1e-6)
    only_head = label(teacher, 6, 0)
    assert only_head.tail_ids.shape == (2000, 0)
    assert soft_labels(only_head, TEMPERATURES, 2.0, "sampled").weights.shape == (2000, 6)


@pytest.mark.parametrize("vocab", [70_000, 152_064, 262_144])
def test_ids_of_large_vocabularies(vocab: int) -> None:
    z = np.full((1, vocab), -20.0)
    z[0, [vocab - 1, 65_537, 3]] = 5.0, 4.0, 3.0
    targets = label(z, 2, 5, gold=vocab - 2)
    np.testing.assert_array_equal(targets.head_ids, [[vocab - 1, 65_537]])
    np.testing.assert_allclose(targets.gold_logprobs, dense_log_probs(z)[0, vocab - 2], rtol=1e-5)
    assert (targets.tail_ids[0, 0], targets.tail_counts.sum()) == (3, 5)
    flat = label(np.zeros((1, vocab)), 0, 2000)
    assert flat.tail_ids.max() > 0.99 * vocab
    coded = encode_targets(flat)
    settings_ = LabelSettings(vocab_size=vocab, head_size=0, tail_draws=2000, temperatures=[1.0, 1.5, 2.0], seed=0)
    np.testing.assert_array_equal(decode_targets(coded, settings_).tail_ids, flat.tail_ids)


def random_masks(random: np.random.Generator, lengths: list[int]) -> Iterator[NDArray[np.bool_]]:
    for length in lengths:
        mask = random.random(length) < 0.6
        mask[[0, -1]] = True, False
        yield mask


def test_batched_and_one_by_one_give_the_same_labels(tmp_path: Path) -> None:
    source = str(make_teacher(tmp_path))
    teacher = load_teacher(source, revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    how = LabelSettings(vocab_size=300, head_size=4, tail_draws=8, temperatures=list(TEMPERATURES), seed=0)
    random = np.random.default_rng(0)
    examples = [
        TokenizedExample(i, random.integers(0, 300, len(mask)), mask, np.zeros(int(mask.sum()), dtype=bool))
        for i, mask in enumerate(random_masks(random, [3, 17, 9, 30, 2, 12]))
    ]
    together = teacher.label(examples, how).targets
    for example, batched in zip(reversed(examples), reversed(together), strict=True):
        alone = teacher.label([example], how).targets[0]
        assert len(alone) == example.target_mask.sum()
        np.testing.assert_array_equal(alone.head_ids, batched.head_ids)
        np.testing.assert_array_equal(alone.tail_counts, batched.tail_counts)
        np.testing.assert_array_equal(alone.tail_ids, batched.tail_ids)
        for name in ("head_logprobs", "tail_logprobs", "log_partition", "log_tail_mass", "gold_logprobs"):
            np.testing.assert_allclose(getattr(alone, name), getattr(batched, name), atol=1e-5)


@pytest.mark.parametrize("vocab", [40, 300, 6400, 6463])
@pytest.mark.parametrize("count", [1, 9])
def test_top_k_by_blocks_equals_topk(vocab: int, count: int) -> None:
    z = torch.randn(20, vocab, generator=torch.Generator().manual_seed(vocab)).round(decimals=1)  # with ties
    z[3] = 0.0
    values, ids = _top(z, count)
    torch.testing.assert_close(values, z.topk(count, dim=1).values)
    torch.testing.assert_close(z.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())
