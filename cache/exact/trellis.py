"""Trellis-coded quantization of coefficients: two interleaved rulers, the next of which the codes so far choose.

The even ruler has the values 0, ±2, ±4, ..., the odd one 0, ±1, ±3, ±5, ... (in steps). Code k stands for the value
2k of the even one or 2k - sign(k) of the odd one, so that codes are as small as those of steps twice as wide. Along a
row of coefficients, the parity of code j - 1, xor that of code j - 3, j - 5, ..., says whether coefficient j is read on
the odd ruler: four states. An encoder seeks the codes that come nearest in sum (pipeline/teachers/exact/viterbi.py). At
the same error that takes about a tenth of a bit less per coefficient of many values, and saves nothing on those of few.

After Marcellin and Fischer, *Trellis coded quantization of memoryless and Gauss-Markov sources* (IEEE Trans. Commun.
38(1), 1990), and the dependent quantization of H.266 (Recommendation ITU-T H.266, 2020, section 8.7.3). Chains end
after ``CHAIN`` coefficients, so that encoders seek in all chains of all positions at once.

Legend: N target positions, C coefficients.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.exact.code import Codes

STATES: Literal[4] = 4
CHAIN = 64  # coefficients


def on_odd_ruler(codes_CN: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Return 1 where a code is read on the odd ruler, (C, N)."""
    odd_CN = (codes_CN & 1).astype(np.uint8)
    ruler_CN = np.zeros_like(odd_CN)
    for first in range(0, len(odd_CN), CHAIN):
        odd, ruler = odd_CN[first : first + CHAIN], ruler_CN[first : first + CHAIN]
        for start in (1, 2):
            before = odd[start - 1 : len(odd) - 1 : 2]
            np.bitwise_xor.accumulate(before, axis=0, out=ruler[start::2][: len(before)])
    return ruler_CN


def values_of(codes_NC: Codes) -> Codes:
    """Return the values that codes stand for, in steps."""
    codes_CN = np.ascontiguousarray(codes_NC.T)
    values_CN = 2 * codes_CN
    values_CN -= np.sign(codes_CN) * on_odd_ruler(codes_CN)
    return values_CN.T


def codes_of(values_NC: Codes) -> Codes:
    """Invert ``values_of``."""
    codes: Codes = np.sign(values_NC) * (np.abs(values_NC) + 1 >> 1)
    return codes
