"""A shard in memory: whole examples, their tokens and their labels."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.fidelity import Sums
from logitcask.cache.targets import IntArray, SparseTargets


@dataclass(frozen=True)
class Example:
    """One example: L tokens, of which N are followed by a labelled target."""

    input_ids: IntArray  # (L,)
    target_mask: NDArray[np.bool_]  # (L,) true at t where the distribution of token t + 1 is stored
    targets: SparseTargets  # N rows, in the order of the mask


@dataclass(frozen=True)
class Shard:
    """E examples laid end to end."""

    token_count: IntArray  # (E,)
    position_count: IntArray  # (E,)
    input_ids: IntArray  # (sum of token_count,)
    target_mask: NDArray[np.bool_]  # (sum of token_count,)
    targets: SparseTargets  # sum of position_count rows
    fidelity: Sums | None = None  # the shard's row of the certificate; None where none was measured, or not read

    def __len__(self) -> int:
        return len(self.token_count)

    @staticmethod
    def of(examples: Sequence[Example], fidelity: Sums | None = None) -> "Shard":
        """The shard of these examples, in order."""
        return Shard(
            token_count=np.array([len(example.input_ids) for example in examples], dtype=np.int64),
            position_count=np.array([len(example.targets) for example in examples], dtype=np.int64),
            input_ids=np.concatenate([example.input_ids for example in examples]),
            target_mask=np.concatenate([example.target_mask for example in examples]),
            targets=SparseTargets.concatenate([example.targets for example in examples]),
            fidelity=fidelity,
        )

    def example(self, index: int) -> Example:
        """The example at a place in the shard."""
        tokens, rows = (slice(starts[index], starts[index + 1]) for starts in self._starts)
        return Example(self.input_ids[tokens], self.target_mask[tokens], self.targets[rows])

    @functools.cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """Where each example's tokens and its positions begin, and the last end."""
        tokens, positions = (np.cumsum(counts).tolist() for counts in (self.token_count, self.position_count))
        return [0, *tokens], [0, *positions]
