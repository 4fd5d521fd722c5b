"""The codes on a trellis that come nearest to given values: Viterbi's algorithm, in all chains of all rows at once.

A state is the ruler of this coefficient and, as the parity so far, what the ruler of the next one depends on beside
this coefficient's own parity (cache/exact/trellis.py): with ruler a and parity b, a code of parity p leads to ruler
p xor b and parity a.

Legend: N target positions, C coefficients, L coefficients of a chain, M chains of all positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from logitcask.cache.exact.trellis import CHAIN

AT_ONCE = 2**22  # values: 100 MB or so of what is computed on the way


def nearest(values_NC: Tensor) -> Tensor:
    """Return the values on the trellis that are nearest in sum of squares, as whole numbers of steps."""
    rows = max(1, AT_ONCE // values_NC.shape[1])
    return torch.cat([_nearest(part) for part in torch.split(values_NC, rows)])


def _nearest(values_NC: Tensor) -> Tensor:
    n, c = values_NC.shape
    chains_LM = pad(values_NC, (0, -c % CHAIN)).view(n, -1, CHAIN).flatten(0, 1).t().contiguous()
    cost_abM = chains_LM.new_full((2, 2, chains_LM.shape[1]), torch.inf)
    cost_abM[0, 0] = 0.0
    came_from = []
    for values_M in chains_LM:
        distance_apM = (candidates(values_M) - values_M).square_()
        even, odd = cost_abM[:, :1] + distance_apM, cost_abM[:, 1:] + distance_apM.flip(1)  # from b = 0, from b = 1
        came_from.append(odd < even)
        cost_abM = torch.minimum(even, odd).transpose(0, 1)  # the new ruler is p xor b, the new parity a
    return _traced(chains_LM, cost_abM, came_from).t().reshape(n, -1)[:, :c]


def _traced(chains_LM: Tensor, cost_abM: Tensor, came_from: list[Tensor]) -> Tensor:
    """Return the values along the cheapest path of each chain, (L, M)."""
    found_LM, every = torch.empty_like(chains_LM), torch.arange(chains_LM.shape[1], device=chains_LM.device)
    state_M = cost_abM.flatten(0, 1).argmin(0)
    ruler_M, parity_M = state_M >> 1, state_M & 1
    for step in reversed(range(len(chains_LM))):
        before_M = came_from[step][parity_M, ruler_M, every].long()
        found_LM[step] = candidates(chains_LM[step])[parity_M, ruler_M ^ before_M, every]
        ruler_M, parity_M = parity_M, before_M
    return found_LM


def candidates(values_M: Tensor) -> Tensor:
    """Return the nearest value of each ruler, even and odd, whose code has an even and an odd parity, (2, 2, M)."""
    size_M, sign_M = values_M.abs(), torch.where(values_M < 0, -1.0, 1.0)
    odd_even_M = 4 * ((size_M + 1) / 4).round_() - 1  # 3, 7, 11, ..., or 0
    return torch.stack([
        4 * (values_M / 4).round(),
        4 * ((values_M - 2) / 4).round_() + 2,
        sign_M * torch.where(size_M < 1.5, 0.0, odd_even_M.clamp_min_(3.0)),
        sign_M * (4 * ((size_M - 1) / 4).round_().clamp_min_(0.0) + 1),
    ]).view(2, 2, -1)  # fmt: skip
