"""What a teacher is to stage 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import IntArray, SparseTargets
from logitcask.cache.manifest import LabelSettings, TeacherIdentity


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids (L,), where the distribution of the next token is wanted, (L,), and where of these to measure fidelity.

    ``index`` is the example's place in the cache.
    """

    index: int
    input_ids: IntArray
    target_mask: NDArray[np.bool_]
    measured: NDArray[np.bool_]  # (N,) a target position each


@dataclass(frozen=True)
class Labelled:
    """Labels of each example, and the sums of the fidelity certificate over all of them."""

    targets: list[SparseTargets]
    fidelity: FidelitySums


@dataclass(frozen=True)
class TeacherFacts:
    """What stage 1 asks of a teacher before it labels anything."""

    identity: TeacherIdentity
    logits_width: int  # rows of the head: the tokenizer's vocabulary, perhaps padded
    max_length: int | None  # the longest sequence the model was made for, None where its config does not say


class Teacher(Protocol):
    """A model that labels tokenized examples."""

    facts: TeacherFacts

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """The labels of each example's target positions, in order."""
        ...
