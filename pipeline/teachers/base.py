"""What a teacher is to stage 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache.manifest import LabelSettings, TeacherIdentity
from cache.targets import IntArray, SparseTargets


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids (L,), and where the distribution of the next token is wanted, (L,).

    ``index`` is the example's place in the cache.
    """

    index: int
    input_ids: IntArray
    target_mask: NDArray[np.bool_]


class Teacher(Protocol):
    """A model that labels tokenized examples."""

    identity: TeacherIdentity

    def label(self, batch: Sequence[TokenizedExample], settings: LabelSettings) -> list[SparseTargets]:
        """The labels of each example's target positions, in order."""
        ...
