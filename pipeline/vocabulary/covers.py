"""Which of the teacher's tokens, at which of its positions, speak of a border between two of the student's tokens.

Let x be the text before a byte b where a token of the student starts. The teacher's own tokens t_1, t_2, ... cut x too,
but what it expects at b need not start with a token at b: a *cover* of b is a token w that the teacher could have
written at t_j, such that w begins with x from the start of t_j up to b. The probability of all covers,

    C(b) = sum over j of P(t_1 ... t_(j-1)) P(w at t_j),

is that of the text up to b, so that C(e) / C(b) is the exact probability of the student's token from b to e, and the
product of these over a text is the teacher's probability of it. Covers that the student cuts otherwise than the text's
tokens do, are none: had the teacher written them, the student's tokens before b would not be what they are. What comes
after a cover that ends at b, and is not the text's own token there, is not known: the teacher has not read that text.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from logitcask.cache.labels import IntArray
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.bridge import NONE, Bridge

MOST_BACK = 8  # tokens of the teacher before the border
KEPT_ENTRIES = 1 << 22  # of lists of covers, in memory


@dataclass(frozen=True)
class Covers:
    """The covers of a border that start at one of the teacher's tokens."""

    row: int  # of that token
    ids: IntArray  # the tokens w
    firsts: IntArray  # the student's first token of what is left of each; NONE if it is not known


@dataclass(frozen=True)
class Border:
    """A byte where a token of the student starts, or where the last one ends."""

    row: int  # of the teacher's token that holds the byte
    starts: bool  # whether that token starts here
    covers: Sequence[Covers]
    like: int  # the row whose tokens stand for what comes after covers that end here, -1: none

    @property
    def lowest(self) -> int:
        """The first row that has a part in it."""
        return min([self.row, *(each.row for each in self.covers)])


@dataclass(frozen=True)
class Position:
    """A labelled position: the border that its token starts at and the one it ends at, None for a special token."""

    gold: int
    start: Border
    end: Border | None


@dataclass
class CoverFinder:
    """Finds covers; lists that were made before are kept."""

    bridge: Bridge
    _lists: dict[tuple[object, ...], tuple[IntArray, IntArray]] = field(default_factory=dict)
    _entries: int = 0

    def batch(self, examples: Iterable[tuple[Encoded, tuple[Encoded, IntArray, IntArray]]]) -> list[Position]:
        """Return the labelled positions of a batch: of the student's tokens, each with what its companion unpacks to.

        Rows are those of the teacher's target tokens of the batch, in order.
        """
        batch, first_row = list[Position](), 0
        for student, (teacher, tokens, offsets) in examples:
            batch += self.positions(student, teacher, tokens, offsets, first_row)
            first_row += int(np.count_nonzero(teacher.target_mask))
        return batch

    def positions(
        self, student: Encoded, teacher: Encoded, tokens: IntArray, offsets: IntArray, first_row: int
    ) -> list[Position]:
        """Return an example's labelled positions; ``first_row`` is that of the teacher's first target token."""
        texts, ids = self.bridge.teacher, teacher.input_ids.tolist()
        starts = np.cumsum([0, *(len(texts[index] or b"") for index in ids)]).tolist()
        whole = b"".join(texts[index] or b"" for index in ids)
        rows = (first_row + np.cumsum([0, *teacher.target_mask])).tolist()
        golds = student.input_ids[np.flatnonzero(student.target_mask) + 1].tolist()
        reach = _Reach(ids, starts, whole, rows, teacher.target_mask.tolist())
        positions = list[Position]()
        for region in _regions(tokens.tolist(), offsets.tolist(), golds, starts, self.bridge):
            path = [(starts[token] + offset, gold) for token, offset, gold in region]
            last = path[-1][0] + len(self.bridge.student[path[-1][1]] or b"")
            special = self.bridge.student[path[-1][1]] is None
            bytes_ = [byte for byte, _ in path]
            borders = [self._border(reach, path, bytes_, token, offset) for token, offset, _ in region]
            if not special:
                end = _token_at(last, region[-1][0], starts)
                borders.append(self._border(reach, path, [*bytes_, last], end, last - starts[end]))
            for index, (_, gold) in enumerate(path):
                end_border = None if special and index + 1 == len(path) else borders[index + 1]
                positions.append(Position(gold, borders[index], end_border))
        return positions

    def _border(
        self, reach: "_Reach", path: list[tuple[int, int]], borders: list[int], token: int, offset: int
    ) -> Border:
        """Return the border ``offset`` bytes into one of the teacher's tokens."""
        byte = reach.starts[token] + offset
        covers = list[Covers]()
        for start in reach.back(token if offset else token - 1, byte, self.bridge.longest):
            beginning = reach.whole[reach.starts[start] : byte]
            first = bisect_left(borders, reach.starts[start])
            between = [(at - reach.starts[start], gold) for at, gold in path[first : bisect_left(borders, byte)]]
            ids, firsts = self._list(beginning, between, reach.ids[start], start == token)
            if len(ids):
                covers.append(Covers(reach.rows[start - 1], ids, firsts))
        open_ended = bool(offset) and reach.mask[token] and any((each.firsts == NONE).any() for each in covers)
        return Border(reach.rows[token - 1], not offset, covers, reach.rows[token] if open_ended else -1)

    def _list(
        self, beginning: bytes, between: list[tuple[int, int]], own: int, holds: bool
    ) -> tuple[IntArray, IntArray]:
        """Return the covers with a beginning that the student cuts as the text.

        The teacher's ``own`` token is one in any case if it ``holds`` the border, and none if it ends there.
        """
        ids = self.bridge.extensions(beginning)
        if not len(ids):
            return ids, ids
        key = (beginning, tuple(between), own)
        if key not in self._lists:
            starts, size, firsts = self.bridge.starts, len(beginning), self.bridge.firsts
            same = np.ones(len(ids), dtype=bool)
            for place, token in between:
                same &= firsts[starts[ids] + place] == token
            same = same | (ids == own) if holds else same & (ids != own)
            ids = ids[same]
            longer = starts[ids + 1] - starts[ids] > size
            after = np.full(len(ids), NONE, dtype=np.int64)
            after[longer] = firsts[starts[ids[longer]] + size]
            if self._entries > KEPT_ENTRIES:
                self._lists.clear()
                self._entries = 0
            self._lists[key] = ids, after
            self._entries += 64 + 2 * len(ids)
        return self._lists[key]


@dataclass(frozen=True)
class _Reach:
    """The teacher's side of an example."""

    ids: list[int]
    starts: list[int]
    whole: bytes
    rows: list[int]  # rows[j - 1] is that of token j
    mask: list[bool]

    def back(self, token: int, byte: int, longest: int) -> Iterator[int]:
        """Yield tokens from one backwards, as long as they are targets of one text and a token can reach the byte."""
        for start in range(token, max(token - MOST_BACK, 0), -1):
            if not self.mask[start - 1] or self.starts[start] == self.starts[start + 1]:
                return
            if byte - self.starts[start] > longest:
                return
            yield start


def _regions(
    tokens: list[int], offsets: list[int], golds: list[int], starts: list[int], bridge: Bridge
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield runs of positions whose tokens follow each other without a gap, up to a special token."""
    region, expected = list[tuple[int, int, int]](), -1
    for token, offset, gold in zip(tokens, offsets, golds, strict=True):
        if region and not (token == _token_at(expected, region[-1][0], starts) and starts[token] + offset == expected):
            yield region
            region = []
        region.append((token, offset, gold))
        text = bridge.student[gold]
        expected = starts[token] + offset + len(text or b"")
        if text is None:
            yield region
            region = []
    if region:
        yield region


def _token_at(byte: int, token: int, starts: list[int]) -> int:
    """Return the token that holds a byte, from one on, or the special token before it."""
    while token + 1 < len(starts) and starts[token] < byte and starts[token + 1] <= byte:
        token += 1
    return token
