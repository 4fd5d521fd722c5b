"""Sparse targets at one temperature: what a loss needs of a label. Pure numpy.

Legend: N target positions, S entries a position (K head tokens, or K + M with the tail), T temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.errors import LogitcaskError
from cache.targets import FloatArray, IntArray, SparseTargets

MASS_FLOOR = -64.0  # nats: a tail of exactly no mass counts as this much, so that reverse KL stays finite


@dataclass(frozen=True)
class SoftLabels:
    """Teacher probabilities at temperature T, sparse."""

    ids: IntArray  # (N, S)
    weights: FloatArray  # (N, S) sum_s weights * f(ids) estimates sum_v p_T(v) f(v); 0 is padding
    log_probs: FloatArray  # (N, S) log p_T of each entry, 0 where the weight is 0
    log_rest: FloatArray  # (N,) log of the mass outside the head at T
    head_size: int  # the first entries of S


def temperature_index(temperatures: Sequence[float], temperature: float) -> int:
    """T's place among the stored temperatures. Raises LogitcaskError, naming them, where it is none of them."""
    for index, stored in enumerate(temperatures):
        if abs(stored - temperature) < 1e-6:
            return index
    stored_names = ", ".join(f"{stored:g}" for stored in temperatures)
    raise LogitcaskError(f"--temperature {temperature:g} is not stored in the cache: it holds {stored_names}")


def soft_labels(targets: SparseTargets, temperatures: Sequence[float], temperature: float, tail: str) -> SoftLabels:
    """Labels at one stored temperature.

    ``sampled``: head weight p_T(v), tail weight (count / M) * p_T(v) / r(v), where r(v) = mean over stored t of
    p_t(v) / (tail mass at t) is what the draws came from; unbiased for every f. ``bucket``: the head, weights p_T(v);
    the rest is ``log_rest``. ``renormalize``: the head's weights made to sum to 1; ignores the rest, biased.
    """
    j = temperature_index(temperatures, temperature)
    head = _log_probs(targets, targets.head_logprobs, temperatures, j)
    weights, ids, log_probs = np.exp(head), targets.head_ids, head
    if tail == "renormalize":
        weights = weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        log_probs = np.log(np.maximum(weights, np.finfo(np.float32).tiny))
    elif tail == "sampled":
        drawn = _log_probs(targets, targets.tail_logprobs, temperatures, j)
        weights = np.concatenate([weights, _tail_weights(targets, drawn, temperatures)], axis=1)
        ids = np.concatenate([ids, targets.tail_ids], axis=1)
        log_probs = np.concatenate([log_probs, drawn], axis=1)
    return SoftLabels(
        ids=ids,
        weights=weights.astype(np.float32),
        log_probs=np.where(weights > 0, log_probs, 0.0).astype(np.float32),
        log_rest=np.maximum(targets.log_tail_mass[:, j], np.float32(MASS_FLOOR)),
        head_size=targets.head_ids.shape[1],
    )


def _log_probs(targets: SparseTargets, logprobs: FloatArray, temperatures: Sequence[float], j: int) -> FloatArray:
    """log p_t(v) = l(v) / t - A(t)."""
    found: FloatArray = logprobs / np.float32(temperatures[j]) - targets.log_partition[:, j, None]
    return found


def _tail_weights(targets: SparseTargets, drawn: FloatArray, temperatures: Sequence[float]) -> FloatArray:
    """(count / M) * p_T / r, from log-probabilities at T, in logs until the end: tail masses may be 1e-30."""
    log_share = [
        _log_probs(targets, targets.tail_logprobs, temperatures, i) - targets.log_tail_mass[:, i, None]
        for i in range(len(temperatures))
    ]
    with np.errstate(invalid="ignore"):
        log_r = np.logaddexp.reduce(np.stack(log_share), axis=0) - np.log(len(temperatures))
        ratio = np.exp(drawn - log_r)
    share = targets.tail_counts / max(1, targets.tail_counts.shape[1])
    weights: FloatArray = np.where(targets.tail_counts > 0, share * np.nan_to_num(ratio), 0.0)
    return weights
