"""Turn logits into sparse labels: pure functions on tensors, the same for every engine.

Legend: N target positions, V vocabulary, K head tokens, M tail draws, J temperatures, z logits, l log-probabilities in
nats at T=1. The label is unbiased at each stored temperature: a tail token drawn from r carries p_T / r (importance
sampling); with J = 1 and K = 0 this is the random-sampling KD of Anshumann et al., ACL 2025, "Sparse Logit Sampling".
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.labels import FloatArray, IntArray, SparseTargets

BLOCK = 128  # vocabulary entries per block, in the two-level sums and in the search for the largest
LARGEST_POWER = 16  # computed by repeated multiplication
BELOW_ONE = 1.0 - 2.0**-40  # the largest uniform number used: never lands past the last token that has mass


def uniform_draws(seed: int, example: int, positions: int, draws: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1) of one example, shape (positions, draws), from a counter-based generator.

    They depend on the arguments alone, so a label never depends on batching, resuming or the number of workers.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, example], dtype=np.uint64)))
    return generator.random((positions, draws))


def sparsify(
    logits_NV: Tensor, gold_N: Tensor, uniforms_NM: Tensor, head_size: int, temperatures: Sequence[float]
) -> SparseTargets:
    """Return sparse labels of N positions.

    ``gold_N`` holds the ids of the tokens that came next, ``uniforms_NM`` numbers in [0, 1), one per tail draw.
    Computes in float32, with cumulative sums in float64: in float32, summing over a vocabulary would bias the draws.
    """
    z_NV = logits_NV.float()
    n, vocab = z_NV.shape
    values, indices = _top(z_NV, min(head_size + 1, vocab))
    head_z_NK, head_ids_NK = values[:, :head_size], indices[:, :head_size]
    peak_N1 = values[:, head_size:] if head_size < vocab else z_NV.new_full((n, 1), -torch.inf)
    has_tail_N1 = peak_N1 > -torch.inf
    stored = list(dict.fromkeys([1.0, *temperatures]))
    root = _common_root(stored)
    powers = [round(root / t, 9) for t in stored]
    shift_N1 = torch.where(has_tail_N1, peak_N1, 0.0) / root
    weights_NBC = _weights(z_NV, shift_N1, head_ids_NK, root)
    masses = dict(zip(stored, _block_masses(weights_NBC, powers), strict=True))
    mass_NJ = torch.stack([mass_NB.sum(1) for mass_NB in masses.values()], dim=1)
    log_tail_NJ = shift_N1 * z_NV.new_tensor(powers) + mass_NJ.log()
    log_z_NJ = torch.logaddexp((head_z_NK[:, :, None] / z_NV.new_tensor(stored)).logsumexp(1), log_tail_NJ)
    log_z_N1, at = log_z_NJ[:, :1], [stored.index(t) for t in temperatures]

    proposal = {powers[j]: (masses[stored[j]], 1.0 / mass_NJ[:, j : j + 1].clamp_min(0.5)) for j in at}
    tail_ids_NM, counts_NM = _count(_draw(weights_NBC, proposal, uniforms_NM).clamp_max(vocab - 1))
    counts_NM *= has_tail_N1
    tail_ids_NM *= counts_NM > 0
    tail_l_NM = (z_NV.gather(1, tail_ids_NM) - log_z_N1).masked_fill(counts_NM == 0, 0.0)
    return SparseTargets(
        head_ids=head_ids_NK.cpu().numpy(),
        head_logprobs=(head_z_NK - log_z_N1).clamp_max(0.0).cpu().numpy(),
        tail_ids=tail_ids_NM.cpu().numpy(),
        tail_logprobs=tail_l_NM.clamp_max(0.0).cpu().numpy(),
        tail_counts=counts_NM.cpu().numpy(),
        log_partition=(log_z_NJ - log_z_N1 / z_NV.new_tensor(stored))[:, at].cpu().numpy(),
        log_tail_mass=(log_tail_NJ - log_z_NJ)[:, at].clamp_max(0.0).cpu().numpy(),
        gold_logprobs=(z_NV.gather(1, gold_N[:, None]) - log_z_N1).squeeze(1).clamp_max(0.0).cpu().numpy(),
    )


def head_only(
    ids_NK: IntArray, logprobs_NK: FloatArray, gold_N: FloatArray, next_ids_N: IntArray, vocab_size: int
) -> SparseTargets:
    """Return labels that are heads at T=1 alone, from log-probabilities; the rest is 1 minus the head.

    What rounding leaves of that difference is at least the probability of the next token outside the head, and at most
    that of all tokens outside it as probable as the head's last.
    """
    n, k = ids_NK.shape
    outside_N = ~(ids_NK == next_ids_N[:, None]).any(1)
    least_N = np.where(outside_N, np.exp(gold_N.astype(np.float64)), 0.0)
    most_N = (vocab_size - k) * np.exp(logprobs_NK[:, -1].astype(np.float64))
    rest_N = np.minimum(np.maximum(1.0 - np.exp(logprobs_NK.astype(np.float64)).sum(1), least_N), most_N)
    none_N0 = np.zeros((n, 0))
    with np.errstate(divide="ignore"):
        log_rest_N1 = np.log(rest_N)[:, None]
    return SparseTargets(
        head_ids=ids_NK,
        head_logprobs=logprobs_NK,
        tail_ids=none_N0.astype(np.int64),
        tail_logprobs=none_N0.astype(np.float32),
        tail_counts=none_N0.astype(np.int64),
        log_partition=np.zeros((n, 1), dtype=np.float32),
        log_tail_mass=log_rest_N1.astype(np.float32),
        gold_logprobs=gold_N,
    )


def _common_root(temperatures: Sequence[float]) -> float:
    """Return R such that R / T is an integer for each T, as 6 for 1, 1.5, 2, or else the largest T.

    exp(z / T) is then a whole power of exp(z / R).
    """
    largest = max(temperatures)
    for root in (largest * factor for factor in range(1, int(LARGEST_POWER * min(temperatures) / largest) + 1)):
        if all(abs(root / t - round(root / t)) < 1e-9 for t in temperatures):
            return root
    return largest


def _weights(z_NV: Tensor, shift_N1: Tensor, head_ids_NK: Tensor, root: float) -> Tensor:
    """Return exp(z / root - shift) in blocks, (N, B, C), the only exponential; 0 in the head and the padding."""
    n, vocab = z_NV.shape
    weights_NV = z_NV.new_zeros(n, vocab + -vocab % BLOCK) if vocab % BLOCK else torch.empty_like(z_NV)
    inside_NV = torch.add(-shift_N1, z_NV, alpha=1.0 / root, out=weights_NV[:, :vocab])  # one pass
    inside_NV.exp_().scatter_(1, head_ids_NK, 0.0)
    return weights_NV.view(n, -1, BLOCK)


def _block_masses(weights_NBC: Tensor, powers: Sequence[float]) -> list[Tensor]:
    """Return the sums over each block of the weights raised to each power, (N, B) each.

    An even power is a square, and a sum of squares needs no squares in memory: 6, 4 and 3 take two multiplications.
    """
    sums = {k: weights_NBC.pow(k).sum(2) for k in powers if k != round(k)}
    last = max((k if k % 2 else k // 2 for k in powers if k not in sums), default=0)
    power_NBC = weights_NBC
    for k in range(1, int(last) + 1):
        if k > 1:
            power_NBC = torch.mul(power_NBC, weights_NBC, out=None if k == 2 else power_NBC)
        if k in powers:
            sums[k] = power_NBC.sum(2)
        if 2 * k in powers:
            sums[2 * k] = torch.linalg.vector_norm(power_NBC, dim=2).square_()
    return [sums[k] for k in powers]


def _top(z_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits and their ids, both (N, count), searching only the blocks with the largest maxima."""
    n, vocab = z_NV.shape
    blocks = vocab // BLOCK
    if blocks <= 4 * count:
        top = z_NV.topk(count, dim=1)
        return top.values, top.indices
    whole = blocks * BLOCK
    blocks_NBC = z_NV[:, :whole].reshape(n, blocks, BLOCK)  # a view
    best_NB = blocks_NBC.amax(2).topk(count, dim=1).indices
    ids_NC = (best_NB[:, :, None] * BLOCK + torch.arange(BLOCK, device=z_NV.device)).flatten(1)
    ids_NC = torch.cat([ids_NC, torch.arange(whole, vocab, device=z_NV.device).expand(n, -1)], dim=1)
    top = z_NV.gather(1, ids_NC).topk(count, dim=1)
    return top.values, ids_NC.gather(1, top.indices)


def _draw(weights_NBC: Tensor, proposal: dict[float, tuple[Tensor, Tensor]], uniforms_NM: Tensor) -> Tensor:
    """Return token ids drawn by inverse CDF, first a block, then a token inside it, (N, M).

    The distribution is a mixture of the weights raised to each power in ``proposal``, which maps a power to its block
    sums, (N, B), and its factor, (N, 1).
    """
    exact = torch.float32 if weights_NBC.device.type == "mps" else torch.float64
    mixed_NB = torch.stack([mass_NB * share_N1 for mass_NB, share_N1 in proposal.values()]).sum(0)
    ends_NB = mixed_NB.cumsum(1, dtype=exact)
    point_NM = uniforms_NM.to(exact).clamp_max(BELOW_ONE) * ends_NB[:, -1:]
    block_NM = torch.searchsorted(ends_NB, point_NM, right=True).clamp_max(ends_NB.shape[1] - 1)
    end_NM = ends_NB.gather(1, block_NM)
    start_NM = torch.where(block_NM > 0, ends_NB.gather(1, (block_NM - 1).clamp_min(0)), 0.0)
    inside_NMC = weights_NBC.gather(1, block_NM[:, :, None].expand(-1, -1, weights_NBC.shape[2]))
    mixed_NMC, power_NMC, reached = torch.zeros_like(inside_NMC), inside_NMC, 1.0
    for k in sorted(proposal):
        power_NMC, reached = power_NMC * inside_NMC.pow(k - reached) if k > reached else power_NMC, k
        mixed_NMC.addcmul_(power_NMC, proposal[k][1][:, :, None])
    inner_NMC = mixed_NMC.cumsum(2, dtype=exact)
    share_NM1 = ((point_NM - start_NM) / (end_NM - start_NM)).clamp(0.0, BELOW_ONE)[:, :, None]
    inside_NM = torch.searchsorted(inner_NMC, share_NM1 * inner_NMC[:, :, -1:], right=True).squeeze(2)
    return block_NM * weights_NBC.shape[2] + inside_NM


def _count(drawn_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct ids, ascending, and their counts, both (N, M); unused slots have id 0 and count 0."""
    ids_NM = drawn_NM.sort(1).values
    new_NM = torch.ones_like(ids_NM)
    new_NM[:, 1:] = ids_NM[:, 1:] != ids_NM[:, :-1]
    slot_NM = new_NM.cumsum(1) - 1
    distinct_NM = torch.zeros_like(ids_NM).scatter_(1, slot_NM, ids_NM)
    counts_NM = torch.zeros_like(ids_NM).scatter_add_(1, slot_NM, torch.ones_like(ids_NM))
    return distinct_NM, counts_NM
