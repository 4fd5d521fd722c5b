"""The teacher's head for exact labels: read, measured through its logits, passed between processes."""

from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcask.cache.exact.code import step_kinds, step_sizes
from logitcask.cache.exact.head import as_bfloat16
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.teachers.exact.fit import fitted, tail_bias
from logitcask.pipeline.teachers.exact.heads import measured_head, packed_head, stored_head, unpacked_head
from tests.support.tiny import FloatArray64

V, W = 90, 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_measured_head_gives_the_logits_of_the_one_that_is_read(
    dtype: torch.dtype, bias: bool, softcap: float | None
) -> None:
    torch.manual_seed(0)
    head = LMHead((torch.randn(V + 6, W) / 4).to(dtype), torch.randn(V + 6).to(dtype) if bias else None, 0.5, softcap)
    if bias and softcap:
        head = LMHead(head.weight, None, 0.5, softcap)
    read, measured = stored_head(head, V), measured_head(head.logits, W, V, torch.zeros((), dtype=dtype))
    assert measured is not None
    assert (measured.softcap is None) == (softcap is None)
    hidden = np.random.default_rng(0).normal(0.0, 3.0, (20, W)).astype(np.float32)
    wanted = read.logits(hidden)
    np.testing.assert_allclose(measured.logits(hidden), wanted, atol=0.02 * np.abs(wanted).max())
    again = unpacked_head(packed_head(measured))
    assert again.identity == measured.identity


def test_a_rank_without_logits_has_no_head_but_gives_the_model_the_same() -> None:
    head = LMHead(torch.randn(V, W), torch.randn(V), 1.0, None)
    given: list[list[torch.Tensor]] = [[], []]

    def logits_of(hidden: torch.Tensor, rank: int) -> torch.Tensor | None:
        given[rank].append(hidden)
        return None if rank else head.logits(hidden)

    heads = [measured_head(partial(logits_of, rank=rank), W, V, torch.zeros(())) for rank in (0, 1)]
    assert heads[0] is not None
    assert heads[1] is None
    assert all(torch.equal(one, other) for one, other in zip(*given, strict=True))


def test_the_bias_of_tails_is_that_of_other_states() -> None:
    """How far log p outside the head is above the teacher's, in float64, is what was measured in calibration."""
    random = np.random.default_rng(0)
    weight = as_bfloat16(random.normal(0.0, 0.5, (V, W)).astype(np.float32))
    read = LMHead(torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16).float(), None, 1.0, None)
    label = LabelSettings(vocab_size=V, head_size=4, tail_draws=0, temperatures=[1.0, 2.0], seed=0)
    known, more, others = random.normal(0.0, 1.0, (3, 4096, W)).astype(np.float32)
    head, code = fitted(stored_head(read, V), known, label, 2)
    biases = np.array(tail_bias(head, more, code, label))
    z = others.astype(np.float64) @ head.weights().T
    heads = np.argsort(-z, axis=1)[:, :4]
    masses = [masked(z / t, heads).sum(1) / np.exp(z / t).sum(1) for t in label.temperatures]
    steps = step_sizes(np.log(np.stack(masses, 1)).astype(np.float32), code.step)
    codes = np.round((others - head.centre) @ head.forward / steps[:, None])
    rebuilt = (codes * steps[:, None] @ head.basis + head.centre).astype(np.float64) @ head.weights().T
    kinds = step_kinds(steps, code.step)
    for j, t in enumerate(label.temperatures):
        ratio = masked(z / t, heads).sum(1) / masked(rebuilt / t, heads).sum(1)
        error = (rebuilt - z) / t + np.log(ratio)[:, None]
        np.put_along_axis(error, heads, 0.0, axis=1)
        of_position = error.sum(1) / (V - 4)
        left = of_position - biases[kinds, j]
        assert of_position.mean() < -0.02
        assert abs(left.mean()) < 0.2 * abs(of_position.mean())


def masked(logits: FloatArray64, heads: NDArray[np.int64]) -> FloatArray64:
    """Return exp of the logits outside the heads, and 0 there."""
    outside = logits.copy()
    np.put_along_axis(outside, heads, -np.inf, axis=1)
    exponentials: FloatArray64 = np.exp(outside)
    return exponentials


def test_directions_that_no_tail_depends_on_are_dropped() -> None:
    """Of isotropic states, of which the head reads half: a basis of the states alone would keep them all."""
    random = np.random.default_rng(0)
    weight = random.normal(0.0, 0.5, (V, W)).astype(np.float32)
    weight[:, W // 2 :] *= 1e-3
    label = LabelSettings(vocab_size=V, head_size=4, tail_draws=0, temperatures=[1.0, 2.0], seed=0)
    hidden = random.normal(0.0, 1.0, (600, W)).astype(np.float32)
    _, code = fitted(stored_head(LMHead(torch.from_numpy(weight), None, 1.0, None), V), hidden, label, 6)
    assert sum(code.columns) == W // 2
