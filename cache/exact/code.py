"""The code of hidden states: whole numbers of steps, packed so that zstd comes near to their entropy.

zstd spends at least one bit on a byte and at best the entropy of single bytes, so that columns of few different values
share bytes: up to 5 columns of 3 values, 3 of 6, 2 of 15. A value outside its column's range is kept modulo the range;
a second array, almost all zeros, holds the quotients; a value more than 127 ranges away is cut. The step of a position
shrinks with the mass of its tail, which is stored anyway: where the head has all the mass, the shape of the tail does
not matter.

Legend: N target positions, C coefficients, P bytes they are packed into, J temperatures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.manifest import STEP_KINDS

LEVELS = (255, 15, 6, 3)  # values of a column, columns sorted by falling range
PER_BYTE = (1, 2, 3, 5)
LARGEST_QUOTIENT = 127
RARE, MARGIN = 1 / 256, 1.2  # a column's range is that of all but so many of its values, and a bit more
LEAST_WEIGHT = 2.0**-12  # of a position: its step is at most 64 times that of a position that is all tail

Codes = NDArray[np.integer[Any]]


def largest_codes(columns: Sequence[int]) -> NDArray[np.int32]:
    """Return the largest code of each column that ``pack`` keeps, (C,)."""
    return np.repeat(np.array([LARGEST_QUOTIENT * levels for levels in LEVELS], np.int32), columns)


def packed_width(columns: Sequence[int]) -> int:
    """Return P, of as many columns of each range."""
    return sum(-(-count // per_byte) for count, per_byte in zip(columns, PER_BYTE, strict=True))


def column_ranges(values_NC: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Return the columns to keep, of calibration values in steps, by falling range, and how many there are of each.

    A column of which almost all values round to 0 is dropped.
    """
    reach = np.quantile(np.abs(values_NC), 1 - RARE, axis=0)
    order = np.argsort(-reach, kind="stable")
    kept = order[: max(1, int((reach > 0.5).sum()))]
    least = np.array([(levels - 1) // 2 + 0.5 for levels in LEVELS])
    kinds = [int((MARGIN * reach[column] <= least[1:]).sum()) for column in kept]  # 0 to 3, rising along the columns
    return kept, tuple(kinds.count(kind) for kind in range(len(LEVELS)))


def pack(codes_NC: Codes, columns: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Return packed columns (N, P), and the quotients (N, C) of values outside their column's range."""
    packed, quotients = np.empty((packed_width(columns), len(codes_NC)), np.uint8), []
    first = place = 0
    for count, levels, per_byte in zip(columns, LEVELS, PER_BYTE, strict=True):
        lowest = (levels - 1) // 2
        quotient, low = np.divmod(codes_NC[:, first : first + count].T.astype(np.int32) + lowest, levels)
        quotients.append(quotient.clip(-LARGEST_QUOTIENT, LARGEST_QUOTIENT))
        for start in range(0, count, per_byte):
            joined = np.zeros(len(codes_NC), np.int32)
            for column in low[start : start + per_byte]:
                joined = joined * levels + column
            packed[place] = joined
            place += 1
        first += count
    return packed.T, np.concatenate(quotients).astype(np.int8).T


def unpack(packed_NP: NDArray[np.uint8], quotients_NC: NDArray[np.int8], columns: Sequence[int]) -> Codes:
    """Invert ``pack``: the codes (N, C), in column order."""
    codes = np.empty((sum(columns), len(packed_NP)), np.int16)
    first = place = 0
    for count, levels, per_byte in zip(columns, LEVELS, PER_BYTE, strict=True):
        for start in range(0, count, per_byte):
            joined = packed_NP[:, place].copy()
            for column in reversed(range(first + start, first + min(start + per_byte, count))):
                codes[column] = joined % levels
                joined //= levels
            place += 1
        codes[first : first + count] -= (levels - 1) // 2
        codes[first : first + count] += np.int16(levels) * quotients_NC[:, first : first + count].T
        first += count
    return codes.T


def step_sizes(log_tail_mass_NJ: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """Return the step of each position, (N,), from the masses of its tail as they are stored; ``step`` if it is all."""
    weight_N = np.exp(log_tail_mass_NJ.astype(np.float64)).mean(1)
    steps: NDArray[np.float32] = (step / np.sqrt(np.maximum(weight_N, LEAST_WEIGHT))).astype(np.float32)
    return steps


def step_kinds(steps_N: NDArray[np.float32], step: float) -> NDArray[np.int64]:
    """Return the kind of each position's step, (N,): how many times the square root of 2 it is above ``step``."""
    rounding = 1e-3  # of float32 and of stored masses, so that the least step is of kind 0
    kinds: NDArray[np.int64] = (2 * np.log2(steps_N / step) + rounding).astype(np.int64).clip(0, STEP_KINDS - 1)
    return kinds
