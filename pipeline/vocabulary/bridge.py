"""What is known of a pair of vocabularies: the bytes of their tokens, and what the student makes of the teacher's.

Legend: V tokens of the teacher, B bytes of all of them together.
"""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray

TokenBytes = list[bytes | None]  # by token id; None: it stands for no text
NONE = -1  # in place of a token


@dataclass(frozen=True)
class Bridge:
    """From a teacher's tokens to a student's."""

    teacher: TokenBytes
    student: TokenBytes
    starts: IntArray  # (V + 1,) where the bytes of each token start among those of all
    firsts: NDArray[np.int32]  # (B,) the student's first token of the rest that starts at a byte; NONE: there is none
    whole: NDArray[np.int32]  # (V,) the same of whole tokens; of a special token, the student's that means the same
    exchange: IntArray | None  # (V,) the teacher's ids by the student's, if their tokens are the same
    ends: tuple[frozenset[int], frozenset[int]]  # special tokens that end a text or a turn, of each side

    @functools.cached_property
    def _ordered(self) -> tuple[list[bytes], IntArray]:
        """The teacher's texts in order, and their ids."""
        texts = sorted((text, index) for index, text in enumerate(self.teacher) if text)
        return [text for text, _ in texts], np.array([index for _, index in texts], dtype=np.int64)

    def extensions(self, beginning: bytes) -> IntArray:
        """Return the teacher's tokens that begin with these bytes."""
        texts, ids = self._ordered
        first = bisect_left(texts, beginning)
        return ids[first : _end(texts, beginning, first)]

    @functools.cached_property
    def longest(self) -> int:
        """The bytes of the teacher's longest token."""
        return max(len(text) for text in self.teacher if text)


def _end(texts: Sequence[bytes], beginning: bytes, first: int) -> int:
    """Return where the texts with this beginning end."""
    after = beginning.rstrip(b"\xff")
    if not after:
        return len(texts)
    return bisect_left(texts, after[:-1] + bytes([after[-1] + 1]), first)
