"""Ways to draw the tail, compared by the variance of the weights in closed form, over real teacher distributions.

For weights w(v) = n(v) p(v) / E n(v), n(v) how often v is drawn, the squared error summed over the vocabulary is
sum p(v)^2 Var n(v) / (E n(v))^2. No student is needed: this is what a label's noise begins with.

Legend: N positions, V vocabulary, K head tokens, M draws, T temperature, r the proposal.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcask.pipeline.settings.precompute import PRESETS
from tests.benchmarks.study.ideas import sizes_by_need
from tests.benchmarks.study.labels import DEFAULT, TeacherFolder

POSITIONS = 2_000
ROWS = 64  # positions at a time
TINY = 1e-300
STORED = "head 8 + tail 24, as stored"


def outside(logits_NV: Tensor, head: int, temperatures: Sequence[float]) -> dict[float, Tensor]:
    """Return p_T of the tokens outside the head, and 0 inside, (N, V) in float64, by temperature."""
    z = logits_NV.double()
    top = z.topk(head, dim=1).indices
    return {t: (z / t).softmax(1).scatter(1, top, 0.0) for t in temperatures}


def proposal(tails: dict[float, Tensor], temperatures: Iterable[float]) -> Tensor:
    """Return the proposal r (N, V): the mean of the tails at these temperatures, each normalised to sum to 1."""
    shares = [tails[t] / tails[t].sum(1, keepdim=True).clamp_min(TINY) for t in temperatures]
    return torch.stack(shares).mean(0).clamp_min(TINY)


def independent(p: Tensor, r: Tensor, draws: int | Tensor) -> Tensor:
    """Return the squared error (N,) of M independent draws, M a number or (N, 1): counts are multinomial."""
    return (p * p * (1 - r) / (draws * r)).sum(1)


def systematic(p: Tensor, r: Tensor, draws: int) -> Tensor:
    """Return the squared error of draws at equal steps from one random start: a count is x = M r rounded down or up."""
    fraction = (draws * r).frac()
    return ((p / (draws * r)) ** 2 * fraction * (1 - fraction)).sum(1)


def overlaps(r: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shares a token has of the M-th where it begins and of the one where it ends; whether it fills one."""
    ends = (draws * r).cumsum(1)
    starts = ends - draws * r
    first = (torch.minimum(ends, starts.floor() + 1) - starts).clamp(0.0, 1.0)
    last = torch.where(ends.floor() > starts.floor(), ends.frac(), 0.0)
    return first, last, ends.floor() - starts.floor() > 1


def stratified(p: Tensor, r: Tensor, draws: int) -> Tensor:
    """Return the squared error of one draw in each M-th of the distribution, by id: a token may straddle parts."""
    first, last, _ = overlaps(r, draws)
    variance = first * (1 - first) + last * (1 - last)
    return ((p / (draws * r)) ** 2 * variance).sum(1)


def inclusion(r: Tensor, sizes_N: Tensor) -> Tensor:
    """Return probabilities min(1, c r) (N, V) that sum to a size: without replacement, each token at most once."""
    ordered = r.sort(1, descending=True).values
    left = ordered.flip(1).cumsum(1).flip(1)
    factor = (sizes_N[:, None] - torch.arange(r.shape[1])) / left  # c, if so many tokens are certain
    first = (factor * ordered <= 1.0).double().argmax(1)
    return (factor.gather(1, first[:, None]) * r).clamp_max(1.0)


def without_replacement(p: Tensor, r: Tensor, sizes_N: Tensor) -> Tensor:
    """Return the squared error (N,) of distinct tokens with weight p / inclusion."""
    pi = inclusion(r, sizes_N)
    return (p * p * (1 - pi) / pi).sum(1)


def distinct(r: Tensor, draws: int | Tensor) -> Tensor:
    """Return the expected number (N,) of distinct tokens among M independent draws."""
    return (1 - (1 - r) ** draws).sum(1)


def entered(r: Tensor, draws: int) -> Tensor:
    """Return the expected number (N,) of distinct tokens among stratified draws."""
    first, last, whole = overlaps(r, draws)
    return torch.where(whole, 1.0, 1 - (1 - first) * (1 - last)).sum(1)


def errors(logits_NV: Tensor, t: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each design at T, its squared error and number of stored entries, both (N,)."""
    head, draws = PRESETS["standard"]
    tails = outside(logits_NV, head, DEFAULT)
    p, r = tails[t], proposal(tails, DEFAULT)
    stored, alone = distinct(r, draws), proposal(tails, [t])
    needed = sizes_by_need(tails[1.0].sum(1))[:, None]
    found = {
        STORED: (independent(p, r, draws), head + stored),
        "systematic draws": (systematic(p, r, draws), head + (draws * r).clamp_max(1.0).sum(1)),
        "stratified draws": (stratified(p, r, draws), head + entered(r, draws)),
        "half the draws by need": (independent(p, r, needed), head + distinct(r, needed)),
        "without replacement, as many entries": (without_replacement(p, r, stored), head + stored),
        "drawn for this T alone": (independent(p, alone, draws), head + distinct(alone, draws)),
    }
    same = [(k, head + draws - k) for k in (0, 4, 16, 24)]
    for k, m in (*same, (16, 48), PRESETS["rich"]):
        others = outside(logits_NV, k, DEFAULT)
        r_k = proposal(others, DEFAULT)
        found[f"head {k} + tail {m}"] = (independent(others[t], r_k, m), k + distinct(r_k, m))
    return found


@torch.inference_mode()
def compare(where: TeacherFolder) -> dict[str, Any]:
    """Return the mean squared error by design and temperature over positions of a folder, relative to stored labels.

    The last design shares as many draws out in proportion to the root of each position's variance at T, which is
    optimal for the mean (Neyman, 1934); its number of entries is taken for today's.
    """
    rows = np.linspace(0, where.rows - 1, POSITIONS).astype(np.int64)
    found: dict[str, Any] = {"positions": len(rows), "temperatures": {}}
    for t in DEFAULT:
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for first in range(0, len(rows), ROWS):
            for name, pair in errors(where.exact.log_probs(rows[first : first + ROWS], 1.0), t).items():
                parts.setdefault(name, []).append(pair)
        means = {name: torch.stack([torch.cat(one) for one in zip(*p, strict=True)]) for name, p in parts.items()}
        base_N = means[STORED][0]
        table = {
            name: {"squared_error": float(pair[0].mean() / base_N.mean()), "entries": float(pair[1].mean())}
            for name, pair in means.items()
        }
        shared = float(base_N.sqrt().mean() ** 2 / base_N.mean())
        table["draws a position by need"] = {"squared_error": shared, "entries": table[STORED]["entries"]}
        found["temperatures"][f"{t:g}"] = {"squared_error_as_stored": float(base_N.mean()), "designs": table}
    return found
