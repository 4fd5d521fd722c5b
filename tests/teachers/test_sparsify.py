"""Any temperatures and vocabularies against dense float64; logits written to a given buffer.

Legend: N positions, V vocabulary, J temperatures, z logits.
"""

import numpy as np
import pytest
import torch

from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.teachers.sparsify import _common_root, sparsify, uniform_draws


@pytest.mark.parametrize(
    ("temperatures", "root"),
    [((1.0, 1.5, 2.0), 6.0), ((1.0,), 1.0), ((1.0, 1.1), 11.0), ((0.5, 1.0, 3.0), 3.0), ((1.0, 1.37, 2.0), 2.0)],
)
@pytest.mark.parametrize("vocab", [9, 300, 5000])
def test_any_temperatures_and_vocabularies_match_the_dense_computation(
    temperatures: tuple[float, ...], root: float, vocab: int
) -> None:
    """With and without integer powers of one exponential and full blocks; logits far from 0."""
    n, head, draws = 4000, 3, 6
    row = 40.0 + 3.0 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64)
    uniforms = torch.from_numpy(uniform_draws(1, 0, n, draws))
    targets = sparsify(row.float().expand(n, -1), torch.zeros(n, dtype=torch.long), uniforms, head, temperatures)
    assert _common_root(temperatures) == pytest.approx(root)
    z = row.float().double()
    outside = z.scatter(1, torch.from_numpy(targets.head_ids[:1]), -torch.inf)
    proposal = np.zeros(vocab)
    for j, t in enumerate(temperatures):
        log_z = torch.logsumexp(z / t, 1)
        log_partition = log_z - torch.logsumexp(z, 1) / t
        np.testing.assert_allclose(targets.log_partition[0, j], log_partition, atol=3e-5)
        np.testing.assert_allclose(targets.log_tail_mass[0, j], torch.logsumexp(outside / t, 1) - log_z, atol=3e-5)
        proposal += (outside / t).softmax(1)[0].numpy() / len(temperatures)
    drawn = np.bincount(targets.tail_ids.ravel(), targets.tail_counts.ravel(), minlength=vocab) / (n * draws)
    for f in (np.arange(vocab) / vocab, np.random.default_rng(0).normal(size=vocab)):
        error = np.sqrt((proposal @ f**2 - (proposal @ f) ** 2) / (n * draws))
        assert abs(drawn @ f - proposal @ f) < 5 * error


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_in_a_reused_buffer_equal_those_in_new_memory(biased: bool, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (30, 8), (30,)))
    head = LMHead(weight, bias if biased else None, 0.5, softcap)
    raw = 0.5 * (hidden @ weight.T + (bias if biased else 0.0))
    want = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    room = torch.full((7, 30), torch.nan)
    logits = head.logits(hidden, room)
    assert logits.data_ptr() == room.data_ptr()
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(head.logits(hidden), want)
    assert room[5:].isnan().all()
