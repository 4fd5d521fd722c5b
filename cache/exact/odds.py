"""Log-odds of the tail against the head, as they are stored: head and tail then always sum to 1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_TAIL = -(2**15)  # the code of log-odds of minus infinity


def odds_codes(log_tail_mass: NDArray[np.float32], scale: float) -> NDArray[np.int16]:
    """Encode log(m / (1 - m)); a tail of no mass becomes NO_TAIL."""
    log_m = log_tail_mass.astype(np.float64)
    with np.errstate(divide="ignore"):
        odds = log_m - np.log(-np.expm1(np.minimum(log_m, -np.finfo(np.float32).tiny)))
    return np.where(np.isneginf(log_m), NO_TAIL, np.clip(np.rint(odds / scale), 1 + NO_TAIL, -1 - NO_TAIL)).astype(
        np.int16
    )


def odds_of(codes: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """Invert ``odds_codes``, up to the scale: log-odds; -inf if there is no tail."""
    return np.where(codes == NO_TAIL, np.float32(-np.inf), codes * np.float32(scale))


def beyond(odds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log(1 + exp(x)) - max(x, 0)."""
    above: NDArray[np.float32] = np.log(1 + np.exp(-np.abs(odds)))
    return above


def log_tail_of(odds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log of the tail's mass."""
    log_tail: NDArray[np.float32] = np.minimum(odds, 0) - beyond(odds)
    return log_tail


def stored_tail_mass(log_tail_mass: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Return the logs of tail masses as they are read back."""
    return log_tail_of(odds_of(odds_codes(log_tail_mass, scale), scale))
