"""Which of the student's tokens start where a token of the teacher starts, and how often.

By itself a token of the teacher gives its probability to the student's first token of its text. But the student may
have a longer token for this and what follows: the users' own texts, tokenized both ways, say how often.

Legend: V tokens of the teacher, U of the student, E entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray
from logitcask.pipeline.vocabulary.bridge import NONE, Bridge

COUNTED = 1 << 22  # positions at most, of the first examples
PRIOR = 1.0  # what the student's first token of the text counts beside them
KEPT_APART = 64  # examples whose counts are merged at a time


@dataclass(frozen=True)
class Spread:
    """What each token of the teacher gives to the student's tokens: E entries, by the student's token."""

    tokens: IntArray  # (E,) the teacher's
    firsts: IntArray  # (E,) the student's, ascending
    weights: NDArray[np.float32]  # (E,) those of a token of the teacher sum to 1


def spread_alone(bridge: Bridge) -> Spread:
    """Return what the tokens' own texts say."""
    return _spread(bridge, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def spread_counted(bridge: Bridge, starts: Iterable[tuple[IntArray, IntArray]]) -> Spread:
    """Return the same with what examples say: for each, the teacher's and the student's tokens that start together."""
    size, seen, waiting = len(bridge.student), 0, list[IntArray]()
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    special = np.array([text is None for text in bridge.teacher])
    for tokens, firsts in starts:
        text = ~special[tokens]
        waiting.append(tokens[text] * size + firsts[text])
        seen += len(waiting[-1])
        if len(waiting) >= KEPT_APART or seen >= COUNTED:
            keys, counts, waiting = *_merged(keys, counts, waiting), []
        if seen >= COUNTED:
            break
    return _spread(bridge, *_merged(keys, counts, waiting))


def _merged(keys: IntArray, counts: IntArray, more: list[IntArray]) -> tuple[IntArray, IntArray]:
    every = np.concatenate([keys, *more])
    weights = np.concatenate([counts, np.ones(len(every) - len(keys), dtype=np.int64)])
    unique, inverse = np.unique(every, return_inverse=True)
    return unique, np.bincount(inverse, weights, minlength=len(unique)).astype(np.int64)


def _spread(bridge: Bridge, keys: IntArray, counts: IntArray) -> Spread:
    size = len(bridge.student)
    known = np.flatnonzero(bridge.whole != NONE)
    every = np.concatenate([keys, known * size + bridge.whole[known]])
    weights = np.concatenate([counts.astype(np.float64), np.full(len(known), PRIOR)])
    unique, inverse = np.unique(every, return_inverse=True)
    sums = np.bincount(inverse, weights, minlength=len(unique))
    tokens, firsts = unique // size, unique % size
    shares = sums / np.bincount(tokens, sums, minlength=len(bridge.teacher))[tokens]
    order = np.lexsort((tokens, firsts))
    return Spread(tokens[order], firsts[order], shares[order].astype(np.float32))
