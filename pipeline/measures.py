"""A student against text and teacher, position by position, and how such figures add up.

Legend: n rows at work, V vocabulary, J temperatures, C = 2 + J columns an example. Losses and divergences are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from logitcask.pipeline.losses import SparseLabels, bucket_divergence, hard_loss, sparse_forward_kl

BINS = 15  # of the calibration error, of equal width
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """What n target positions tell."""

    hard_n: Tensor  # cross-entropy with the next token
    kl_nJ: Tensor  # KL(p_T || q_T) at each temperature, estimated from the label
    top_n: Tensor  # the student's most probable token
    confidence_n: Tensor  # its probability at T=1


def measure(logits_nV: Tensor, gold_n: Tensor, labels: Sequence[tuple[float, SparseLabels]], tail: str) -> Measures:
    """Measures of some rows of logits; ``labels`` has a temperature and the teacher's entries at it, J times.

    With tail ``sampled`` the KL is unbiased, and exact where the head is the whole vocabulary; with ``bucket`` all
    tokens outside the head count as one outcome, and it is a lower bound.
    """
    log_q_nV = functional.log_softmax(logits_nV, dim=1)
    log_top_n, top_n = log_q_nV.max(1)
    divergences = []
    for temperature, entries in labels:
        tempered = log_q_nV if temperature == 1.0 else functional.log_softmax(logits_nV / temperature, dim=1)
        divergences.append(
            bucket_divergence(tempered, entries, "forward-kl")
            if tail == "bucket"
            else sparse_forward_kl(tempered, entries)
        )
    return Measures(hard_loss(logits_nV, gold_n), torch.stack(divergences, dim=1), top_n, log_top_n.exp())


def calibration_bins(confidence_n: Array, right_n: NDArray[np.bool_]) -> Array:
    """Sums by bin of confidence, (BINS, 2): of the confidences, and of the predictions that were right."""
    place = np.minimum((confidence_n * BINS).astype(np.int64), BINS - 1)
    return np.stack([np.bincount(place, weights, BINS) for weights in (confidence_n, right_n)], axis=1)


def calibration_error(bins: Array, positions: int) -> float:
    """Expected calibration error (Naeini et al., 2015): |mean confidence - share right| of each bin, by its size."""
    return float(np.abs(bins[:, 0] - bins[:, 1]).sum() / positions)


class ClusterSums:
    """Means over positions with their standard errors over examples, in memory that does not grow with them.

    An example's row holds the number of its positions, then sums over them. A mean over positions is a ratio of two
    sums over examples, R = sum k / sum n; its variance is that of sum (k - R n) over (sum n)^2 (Cochran, Sampling
    Techniques, 1977, section 2.11), so that positions of one example need not be independent.
    """

    def __init__(self, columns: int) -> None:
        self._examples = 0
        self._sums = np.zeros(columns)
        self._products = np.zeros((columns, columns))

    def add(self, rows_EC: Array) -> None:
        """Add the rows of E examples."""
        self._examples += len(rows_EC)
        self._sums += rows_EC.sum(0)
        self._products += rows_EC.T @ rows_EC

    def mean(self, column: int) -> tuple[float, float | None]:
        """Mean over positions and its standard error; None of a single example."""
        positions, count = self._sums[0], self._examples
        ratio = self._sums[column] / positions
        if count < 2:
            return float(ratio), None
        p = self._products
        spread = p[column, column] - 2 * ratio * p[column, 0] + ratio**2 * p[0, 0]
        return float(ratio), float(np.sqrt(max(0.0, spread) * count / (count - 1)) / positions)
