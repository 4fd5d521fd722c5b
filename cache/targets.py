"""SparseTargets: the soft labels of N target positions, the one record that both stages speak.

Legend: N target positions, K head tokens, M tail draws, J temperatures. Log-probabilities l(v) are in nats, at T=1,
normalised over the teacher's full vocabulary before anything is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class SparseTargets:
    """Sparse soft labels of N positions, row by row.

    Draws are kept as distinct ids with counts; a slot with count 0 is padding (id 0, log-probability 0). Ids and counts
    may be of narrower integer types than int64, as a cache stores them.
    """

    head_ids: IntArray  # (N, K) the K most probable tokens, most probable first
    head_logprobs: FloatArray  # (N, K) l(v)
    tail_ids: IntArray  # (N, M) distinct tokens drawn outside the head, ascending, padding last
    tail_logprobs: FloatArray  # (N, M) l(v)
    tail_counts: IntArray  # (N, M) how often each was drawn; a row sums to M, or to 0 where there is no tail
    log_partition: FloatArray  # (N, J) A(t) = log sum_v exp(l(v) / t)
    log_tail_mass: FloatArray  # (N, J) log of the probability outside the head at t; -inf where there is none
    gold_logprobs: FloatArray  # (N,) l of the token that really came next

    def __len__(self) -> int:
        return len(self.gold_logprobs)

    def __getitem__(self, rows: slice | IntArray) -> "SparseTargets":
        return SparseTargets(*(getattr(self, name)[rows] for name in NAMES))

    @staticmethod
    def concatenate(parts: Sequence["SparseTargets"]) -> "SparseTargets":
        """The rows of all parts, in order."""
        return SparseTargets(*(np.concatenate([getattr(part, name) for part in parts]) for name in NAMES))


NAMES = tuple(field.name for field in fields(SparseTargets))
