"""The codes on a trellis that come nearest to given values: Viterbi's algorithm, in all chains of all rows at once.

A state is the ruler of this coefficient and the parity so far, on which the next one's ruler depends beside this
code's own parity (cache/exact/trellis.py): from ruler a and parity b, a code of parity p leads to ruler p xor b and
parity a.

Legend: N target positions, C coefficients, L coefficients of a chain, M chains of all positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from logitcask.cache.exact.trellis import CHAIN

AT_ONCE = 2**21  # values, which bounds what is in memory on the way


def nearest(values_NC: Tensor) -> Tensor:
    """Return the values on the trellis that are nearest in sum of squares, as whole numbers of steps."""
    rows = max(1, AT_ONCE // values_NC.shape[1])
    return torch.cat([_nearest(part) for part in torch.split(values_NC, rows)])


def _nearest(values_NC: Tensor) -> Tensor:
    n, c = values_NC.shape
    chains_LM = pad(values_NC, (0, -c % CHAIN)).view(n, -1, CHAIN).flatten(0, 1).t().contiguous()
    found_L22M = candidates(chains_LM)
    distances_L22M = (found_L22M - chains_LM[:, None, None]).square_()
    cost_22M = chains_LM.new_full((2, 2, chains_LM.shape[1]), torch.inf)  # by ruler, parity so far
    cost_22M[0, 0] = 0.0
    came_from = []
    for distance_22M in distances_L22M:  # by ruler, parity of the code
        even, odd = cost_22M[:, :1] + distance_22M, cost_22M[:, 1:] + distance_22M.flip(1)  # as the parity so far
        came_from.append((odd < even).flatten(0, 1))
        cost_22M = torch.minimum(even, odd).transpose(0, 1)  # a new ruler, and as the new parity the one before it
    chosen_LM = _traced(cost_22M, came_from)
    values_LM = found_L22M.flatten(1, 2).gather(1, chosen_LM[:, None])[:, 0]
    return values_LM.t().reshape(n, -1)[:, :c]


def _traced(cost_22M: Tensor, came_from: list[Tensor]) -> Tensor:
    """Return along the cheapest path of each chain 2 * ruler + parity of the code, (L, M)."""
    state_M, chosen = cost_22M.flatten(0, 1).argmin(0), []
    for odd_4M in reversed(came_from):
        ruler_M, parity_M = state_M >> 1, state_M & 1  # after the code; the parity is the ruler that it was read on
        before_M = odd_4M.gather(0, (2 * parity_M + ruler_M)[None])[0].long()
        chosen.append(2 * parity_M + (ruler_M ^ before_M))
        state_M = 2 * parity_M + before_M
    return torch.stack(chosen[::-1])


def candidates(values_LM: Tensor) -> Tensor:
    """Return the nearest value on each ruler, even and odd, whose code has an even and an odd parity, (L, 2, 2, M)."""
    size_LM, sign_LM = values_LM.abs(), torch.where(values_LM < 0, -1.0, 1.0)
    odd_even_LM = 4 * ((size_LM + 1) / 4).round_() - 1  # 3, 7, 11, ..., or 0
    four = [
        4 * (values_LM / 4).round_(),
        4 * ((values_LM - 2) / 4).round_() + 2,
        sign_LM * torch.where(size_LM < 1.5, 0.0, odd_even_LM.clamp_min_(3.0)),
        sign_LM * (4 * ((size_LM - 1) / 4).round_().clamp_min_(0.0) + 1),
    ]
    return torch.stack(four, 1).view(len(values_LM), 2, 2, -1)
