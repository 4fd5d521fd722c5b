"""Logits to sparse labels: pure functions on tensors, the same for every engine.

Legend: N target positions, V vocabulary, K head tokens, M tail draws, J temperatures, z logits, l log-probabilities in
nats at T=1. The label is unbiased at each stored temperature: a tail token drawn from r carries p_T / r (importance
sampling); with J = 1 and K = 0 this is the random-sampling KD of Anshumann et al., ACL 2025, "Sparse Logit Sampling".
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.targets import SparseTargets

BLOCK = 256  # vocabulary entries a block of the two-level sum
TOP_BLOCK = 64  # and of the search for the largest
BELOW_ONE = 1.0 - 2.0**-40  # the largest uniform number used: never lands past the last token with any mass


def uniform_draws(seed: int, example: int, positions: int, draws: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) of one example, shape (positions, draws), from a counter-based generator.

    They depend on the arguments only, so a label never depends on batching, resuming or the number of workers.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, example], dtype=np.uint64)))
    return generator.random((positions, draws))


def sparsify(
    logits_NV: Tensor, gold_N: Tensor, uniforms_NM: Tensor, head_size: int, temperatures: Sequence[float]
) -> SparseTargets:
    """Sparse labels of N positions.

    ``gold_N`` holds the ids of the tokens that came next, ``uniforms_NM`` numbers in [0, 1), one a tail draw. Works in
    float32, running sums in float64 (a float32 running sum over a vocabulary is itself a bias).
    """
    z_NV = logits_NV.float()
    n, vocab = z_NV.shape
    values, indices = _top(z_NV, min(head_size + 1, vocab))
    head_z_NK, head_ids_NK = values[:, :head_size], indices[:, :head_size]
    peak_N1 = values[:, head_size:] if head_size < vocab else z_NV.new_full((n, 1), -torch.inf)
    has_tail_N1 = peak_N1 > -torch.inf
    peak_N1 = torch.where(has_tail_N1, peak_N1, 0.0)

    log_z, log_tail = {}, {}
    proposal_NV = torch.zeros_like(z_NV)
    below_NV = torch.sub(z_NV, peak_N1)  # at most 0 outside the head, so that its exp never overflows there
    for t in dict.fromkeys([1.0, *temperatures]):
        weight_NV = torch.mul(below_NV, 1.0 / t).exp_()
        weight_NV.scatter_(1, head_ids_NK, 0.0)
        mass_N1 = weight_NV.sum(1, keepdim=True)
        log_tail[t] = peak_N1 / t + mass_N1.log()
        log_z[t] = torch.logaddexp((head_z_NK / t).logsumexp(1, keepdim=True), log_tail[t])
        if t in temperatures:
            proposal_NV.addcmul_(weight_NV, 1.0 / mass_N1.clamp_min(1.0))

    drawn_NM = _draw(proposal_NV, uniforms_NM)
    tail_ids_NM, counts_NM = _count(drawn_NM)
    counts_NM *= has_tail_N1
    tail_ids_NM *= counts_NM > 0
    tail_l_NM = (z_NV.gather(1, tail_ids_NM) - log_z[1.0]).masked_fill(counts_NM == 0, 0.0)
    return SparseTargets(
        head_ids=head_ids_NK.cpu().numpy(),
        head_logprobs=(head_z_NK - log_z[1.0]).clamp_max(0.0).cpu().numpy(),
        tail_ids=tail_ids_NM.cpu().numpy(),
        tail_logprobs=tail_l_NM.clamp_max(0.0).cpu().numpy(),
        tail_counts=counts_NM.cpu().numpy(),
        log_partition=torch.cat([log_z[t] - log_z[1.0] / t for t in temperatures], dim=1).cpu().numpy(),
        log_tail_mass=torch.cat([log_tail[t] - log_z[t] for t in temperatures], dim=1).clamp_max(0.0).cpu().numpy(),
        gold_logprobs=(z_NV.gather(1, gold_N[:, None]) - log_z[1.0]).squeeze(1).clamp_max(0.0).cpu().numpy(),
    )


def _top(z_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits and their ids, both (N, count): they lie in the blocks of the largest maxima."""
    n, vocab = z_NV.shape
    blocks = vocab // TOP_BLOCK
    if blocks <= 4 * count:
        top = z_NV.topk(count, dim=1)
        return top.values, top.indices
    whole = blocks * TOP_BLOCK
    blocks_NBC = z_NV[:, :whole].reshape(n, blocks, TOP_BLOCK)  # a view
    best_NB = blocks_NBC.amax(2).topk(count, dim=1).indices
    among = torch.arange(TOP_BLOCK, device=z_NV.device)
    ids_NC = torch.cat(
        [
            (best_NB[:, :, None] * TOP_BLOCK + among).flatten(1),
            torch.arange(whole, vocab, device=z_NV.device).expand(n, -1),
        ],
        dim=1,
    )
    top = z_NV.gather(1, ids_NC).topk(count, dim=1)
    return top.values, ids_NC.gather(1, top.indices)


def _draw(proposal_NV: Tensor, uniforms_NM: Tensor) -> Tensor:
    """Token ids drawn by inverse CDF from unnormalised weights: first a block, then a token inside it, (N, M)."""
    n, vocab = proposal_NV.shape
    exact = torch.float32 if proposal_NV.device.type == "mps" else torch.float64
    blocks_NBC = torch.nn.functional.pad(proposal_NV, (0, -vocab % BLOCK)).view(n, -1, BLOCK)
    ends_NB = blocks_NBC.sum(2).to(exact).cumsum(1)
    point_NM = uniforms_NM.to(exact).clamp_max(BELOW_ONE) * ends_NB[:, -1:]
    block_NM = torch.searchsorted(ends_NB, point_NM, right=True).clamp_max(ends_NB.shape[1] - 1)
    end_NM = ends_NB.gather(1, block_NM)
    start_NM = torch.where(block_NM > 0, ends_NB.gather(1, (block_NM - 1).clamp_min(0)), 0.0)
    inner_NMC = blocks_NBC.gather(1, block_NM[:, :, None].expand(-1, -1, BLOCK)).to(exact).cumsum(2)
    share_NM1 = ((point_NM - start_NM) / (end_NM - start_NM)).clamp(0.0, BELOW_ONE)[:, :, None]
    inside_NM = torch.searchsorted(inner_NMC, share_NM1 * inner_NMC[:, :, -1:], right=True).squeeze(2)
    return (block_NM * BLOCK + inside_NM).clamp_max(vocab - 1)


def _count(drawn_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, ascending, and their counts; unused slots have id 0 and count 0. Both (N, M)."""
    ids_NM = drawn_NM.sort(1).values
    new_NM = torch.ones_like(ids_NM)
    new_NM[:, 1:] = ids_NM[:, 1:] != ids_NM[:, :-1]
    slot_NM = new_NM.cumsum(1) - 1
    distinct_NM = torch.zeros_like(ids_NM).scatter_(1, slot_NM, ids_NM)
    counts_NM = torch.zeros_like(ids_NM).scatter_add_(1, slot_NM, torch.ones_like(ids_NM))
    return distinct_NM, counts_NM
