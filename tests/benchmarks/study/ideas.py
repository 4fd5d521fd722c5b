"""Ways to reduce the label's noise at the same size, tried on students: how labels are drawn, stored and used.

What was expected of each, before any student, is in designs.py; docs/results has what came of it.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.labels import SparseTargets
from logitcask.pipeline.settings.precompute import PRESETS
from tests.benchmarks.study.labels import DEFAULT, Stored, Way

SIZES = (12, 24, 48, 96)  # draws per position, from a small tail to a large one
HEAD, DRAWS = PRESETS["standard"]
SETS = 4  # of draws: one per epoch if they are redrawn
STANDARD = Stored(HEAD, DRAWS, DEFAULT)
STORED = {
    "stratified": replace(STANDARD, numbers="stratified"),
    "need": Stored(HEAD, max(SIZES), DEFAULT, numbers="by need"),
    "T=1 alone": replace(STANDARD, temperatures=(1.0,)),
    "T=2 alone": replace(STANDARD, temperatures=(2.0,)),
    **{f"set {number}": replace(STANDARD, seed=number) for number in range(1, SETS)},
}
WAYS = {
    "standard, stratified draws": Way("stratified", "sampled"),
    "standard, half the draws by need": Way("need", "sampled"),
    "standard, drawn for T=1 alone": Way("T=1 alone", "sampled"),
    "standard, drawn for T=2 alone": Way("T=2 alone", "sampled"),
    **{f"standard, set {number}": Way(f"set {number}", "sampled") for number in range(1, SETS)},
}
REDRAWN = ("standard", *[f"standard, set {number}" for number in range(1, SETS)])  # a way for each epoch


def sizes_by_need(tail_mass_N: Tensor) -> Tensor:
    """Return draws per position (N,), DRAWS on average: half equal for all, half in proportion to the tail at T=1."""
    wanted_N = DRAWS / 2 * (1 + tail_mass_N / tail_mass_N.mean().clamp_min(1e-6))
    sizes = wanted_N.new_tensor(SIZES)
    return sizes[(wanted_N[:, None].log() - sizes.log()).abs().argmin(1)].long()


def stratified(uniforms_NM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map the numbers to one in each M-th of [0, 1)."""
    draws = uniforms_NM.shape[1]
    numbers: NDArray[np.float64] = (np.arange(draws) + uniforms_NM) / draws
    return numbers


def widened(targets: SparseTargets, draws: int) -> SparseTargets:
    """Return the same labels padded for more draws."""
    room = ((0, 0), (0, draws - targets.tail_ids.shape[1]))
    names = ("tail_ids", "tail_logprobs", "tail_counts")
    return replace(targets, **{name: np.pad(getattr(targets, name), room) for name in names})
