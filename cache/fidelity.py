"""The fidelity certificate: how far labels are from the teacher's full distributions, measured on sampled positions.

Legend: n sampled positions, J temperatures, K coordinates of a sketch, h a hidden state of the teacher, p its
distribution at T, q that of the probe student, p' the stored label's estimate of p.

The probe student is a half-trained linear output head on h: it predicts q = softmax(z / 2T) where the teacher has
p = softmax(z / T). The exact gradient of its loss at a position is G = (q - p) h^T. The label's gradient is
(w q - p') h^T with w = sum p' (1 only on average if the tail is drawn), that is G + E with
E = ((w - 1) q + p - p') h^T. Gradients are reduced to sketches of K coordinates with unbiased inner products
(``pipeline.teachers.fidelity_probe``). Rows of sums add up over positions and shards. A row holds n, then for each
temperature and each of G, E of the label and E of top-k renormalised: the sum of squares, the sum of products with G,
the same two sums of the sketches, and the summed sketch. A row of exact labels ends with the sums of KL(p || p'),
in nats, one per temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SKETCH = 128
BATCH = 1000  # positions in the batch whose gradient the figures describe
MOMENTS = 4
VECTORS = 3  # the exact gradient, the error of the label, the error of top-k renormalised


def row_width(temperatures: int, *, exact: bool = False) -> int:
    """Return the length of a row of sums."""
    return 1 + temperatures * (VECTORS * (MOMENTS + SKETCH) + exact)


@dataclass(frozen=True)
class FidelitySums:
    """A row of sums; rows add up over positions, batches and shards."""

    row: NDArray[np.float64]

    @staticmethod
    def zeros(temperatures: Sequence[float], *, exact: bool = False) -> "FidelitySums":
        """Return the sums over no positions, of sparse or of exact labels."""
        return FidelitySums(np.zeros(row_width(len(temperatures), exact=exact)))

    @property
    def positions(self) -> float:
        """The number of positions measured."""
        return float(self.row[0])

    def __add__(self, other: "FidelitySums") -> "FidelitySums":
        return FidelitySums(self.row + other.row)


@dataclass(frozen=True)
class Fidelity:
    """Error of the probe student's gradient from labels over ``BATCH`` positions, relative to the exact one's norm.

    ``bias`` averages out in no batch and is measurable only above ``bias_floor``; ``noise`` is the rest, at this batch
    size.
    """

    bias: float
    bias_floor: float
    noise: float
    cosine: float
    degrees: float  # the angle with that cosine


def figures(sums: FidelitySums, temperatures: int) -> list[tuple[Fidelity, Fidelity]] | None:
    """Return the figures per temperature: of the label, and of as many most probable tokens renormalised.

    Means over pairs of different positions are unbiased: (|sum s|^2 - sum |s|^2) / (n (n - 1)). None if the positions
    are too few to distinguish the mean gradient from zero.
    """
    n = sums.positions
    table = _table(sums, temperatures)
    rows = []
    for square, cross, sketch_square, sketch_cross, sketch in (
        (*(table[j, :, moment] for moment in range(MOMENTS)), table[j, :, MOMENTS:]) for j in range(temperatures)
    ):
        if n < 2:
            return None
        mean_square = ((sketch**2).sum(1) - sketch_square) / (n * (n - 1))
        mean_cross = (sketch @ sketch[0] - sketch_cross) / (n * (n - 1))
        if mean_square[0] <= 0:
            return None
        in_batch = np.maximum(mean_square, 0.0) * (1 - 1 / BATCH) + square / n / BATCH
        with_exact = mean_cross * (1 - 1 / BATCH) + cross / n / BATCH
        rows.append(
            tuple(
                _fidelity(mean_square[v], square[v] / n, in_batch[v], with_exact[v], mean_square[0], in_batch[0], n)
                for v in (1, 2)
            )
        )
    return rows  # type: ignore[return-value]


def divergences(sums: FidelitySums, temperatures: int) -> list[float] | None:
    """Return the mean KL(teacher || label) per temperature, in nats; None if it was not measured."""
    if sums.positions == 0 or len(sums.row) != row_width(temperatures, exact=True):
        return None
    means: list[float] = (sums.row[-temperatures:] / sums.positions).tolist()
    return means


def _table(sums: FidelitySums, temperatures: int) -> NDArray[np.float64]:
    """Return the sums of gradients, (temperatures, vectors, moments and sketch)."""
    return sums.row[1 : row_width(temperatures)].reshape(temperatures, VECTORS, MOMENTS + SKETCH)


def _fidelity(
    bias2: float, square: float, error: float, cross: float, mean_exact: float, exact: float, n: float
) -> Fidelity:
    bias2 = max(0.0, bias2)
    label = max(exact + 2 * cross + error, np.finfo(np.float64).tiny)
    cosine = float(np.clip((exact + cross) / np.sqrt(exact * label), -1.0, 1.0))
    return Fidelity(
        bias=float(np.sqrt(bias2 / mean_exact)),
        bias_floor=float(np.sqrt(square / n / mean_exact)),
        noise=float(np.sqrt(max(0.0, square - bias2) / BATCH / exact)),
        cosine=cosine,
        degrees=float(np.degrees(np.arccos(cosine))),
    )


def unsound(sums: FidelitySums, temperatures: int, positions: int, *, exact: bool = False) -> str | None:
    """Return what is wrong with a shard's row, or None."""
    if sums.row.shape != (row_width(temperatures, exact=exact),) or not np.isfinite(sums.row).all():
        return "fidelity: must be finite numbers"
    if not 0 <= sums.positions <= positions:
        return f"fidelity: measured on {sums.positions:g} positions, but the shard has {positions}"
    squares = _table(sums, temperatures)[:, :, (0, 2)]
    return "fidelity: a sum of squares is negative" if squares.min() < 0 else None
