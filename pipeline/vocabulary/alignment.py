"""Align two tokenizations of the targets of an example, by their bytes.

Targets are cut at special tokens into texts. Where the two sides' texts are equal, at their beginning or their end,
each token of the student starts at a byte of one token of the teacher. Where they differ, as chat templates and
normalisers make them, the student's tokens are not labelled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.bridge import Bridge, TokenBytes

OFFSET_BITS = 12  # of a place as a number: tokens have fewer than 4,096 bytes


@dataclass(frozen=True)
class Alignment:
    """Where the tokens of a student's N labelled positions start in the teacher's tokens."""

    labelled: NDArray[np.bool_]  # (L,) those of the student's target positions that can be labelled
    tokens: IntArray  # (N,) the teacher's token that holds the first byte, or the special token that means the same
    offsets: IntArray  # (N,) bytes of that token before it


@dataclass(frozen=True)
class _Text:
    """Tokens first to stop of one side, all of them targets, and the special token after them."""

    first: int
    stop: int
    end: int | None
    cut: bool  # whether the example ends here without one: the text may be truncated
    content: bytes
    before: bytes = b""  # the example's first token, if that is text: nothing predicts it


def align(student: Encoded, teacher: Encoded, bridge: Bridge) -> Alignment:
    """Return the alignment of an example's two tokenizations."""
    labelled, tokens, offsets = np.zeros(len(student.input_ids), dtype=bool), list[int](), list[int]()
    for own, other in _pairs(list(_texts(student, bridge.student)), list(_texts(teacher, bridge.teacher))):
        places = list(_places(own, other, student, teacher, bridge))
        for index, token, offset in places:
            labelled[index - 1] = True
            tokens.append(token)
            offsets.append(offset)
    return Alignment(labelled, np.array(tokens, dtype=np.int64), np.array(offsets, dtype=np.int64))


def _texts(example: Encoded, texts: TokenBytes) -> Iterator[_Text]:
    targets = (np.flatnonzero(example.target_mask) + 1).tolist()
    ids = example.input_ids.tolist()
    first, content = None, list[bytes]()
    for index in targets:
        first = index if first is None else first
        before = (texts[ids[0]] or b"") if first == 1 else b""
        text = texts[ids[index]]
        if text is None:
            yield _Text(first, index, index, False, b"".join(content), before)
            first, content = None, []
            continue
        content.append(text)
        if index + 1 == len(ids) or not example.target_mask[index]:
            yield _Text(first, index + 1, None, index + 1 == len(ids), b"".join(content), before)
            first, content = None, []


def _pairs(own: Sequence[_Text], other: Sequence[_Text]) -> Iterator[tuple[_Text, _Text]]:
    """Yield texts that belong together: by their order or, if one side has more, those that are equal."""
    if len(own) == len(other):
        yield from zip(own, other, strict=True)
        return
    matcher = SequenceMatcher(None, [text.content for text in own], [text.content for text in other], autojunk=False)
    for match in matcher.get_matching_blocks():
        yield from zip(own[match.a : match.a + match.size], other[match.b : match.b + match.size], strict=True)


def _places(
    own: _Text, other: _Text, student: Encoded, teacher: Encoded, bridge: Bridge
) -> Iterator[tuple[int, int, int]]:
    """Yield the index of each of the student's tokens that can be labelled, with its place in the teacher's tokens."""
    lead, other_lead = _leads(own, other)
    head, tail = _common(own.content[lead:], other.content[other_lead:], own.cut or other.cut)
    starts = np.cumsum([0, *(len(bridge.teacher[t] or b"") for t in teacher.input_ids[other.first : other.stop])])
    begin, shift = 0, len(other.content) - len(own.content)
    for index in range(own.first, own.stop):
        end = begin + len(bridge.student[student.input_ids[index]] or b"")
        if lead <= begin < end <= lead + head or len(own.content) - tail <= begin < end:
            place = begin - lead + other_lead if end <= lead + head else begin + shift
            token = int(np.searchsorted(starts, place, side="right")) - 1
            yield index, other.first + token, place - int(starts[token])
        begin = end
    if own.end is not None and other.end is not None and (tail or own.content == other.content):
        ours, theirs = int(student.input_ids[own.end]), int(teacher.input_ids[other.end])
        if bridge.whole[theirs] == ours or (theirs in bridge.ends[0] and ours in bridge.ends[1]):
            yield own.end, other.end, 0


def _leads(own: _Text, other: _Text) -> tuple[int, int]:
    """Return how many bytes of each text come before what they have in common.

    That is a blank which one side's tokenizer puts before a text, or the other's first token if nothing predicts it.
    """
    ways = [*((size, 0) for size in _lead(own, other)), *((0, size) for size in _lead(other, own))]
    return max(ways, key=lambda way: _shared(own.content[way[0] :], other.content[way[1] :]))


def _lead(text: _Text, other: _Text) -> list[int]:
    before = other.before
    leads = (b"", b" ", before, b" " + before, before.removeprefix(b" "))
    return [len(lead) for lead in leads if text.content.startswith(lead)]


def _common(one: bytes, two: bytes, cut: bool) -> tuple[int, int]:
    """Return how many bytes two texts have in common at their beginning and, unless one is cut, at their end."""
    if one == two:
        return len(one), 0 if cut else len(one)
    head = _shared(one, two)
    return head, 0 if cut else _shared(one[head:][::-1], two[head:][::-1])


def _shared(one: bytes, two: bytes) -> int:
    """Return the length of the common beginning."""
    size = min(len(one), len(two))
    differ = np.flatnonzero(np.frombuffer(one[:size], np.uint8) != np.frombuffer(two[:size], np.uint8))
    return int(differ[0]) if len(differ) else size


def kinds_line(kinds: Sequence[int]) -> str:
    """Return the shares of target positions: the student's token starts with one of the teacher's, inside one, or it
    could not be aligned."""
    total = max(1, sum(kinds))
    aligned, straddling, unlabelled = (f"{kind / total:.1%}" for kind in kinds)
    return f"{aligned} aligned, {straddling} straddling, {unlabelled} unlabelled"


def pack_companion(teacher: Encoded, alignment: Alignment) -> bytes:
    """Return the teacher's tokens and where the student's start in them, as bytes."""
    places = (alignment.tokens << OFFSET_BITS | alignment.offsets).astype("<u4")
    ids = teacher.input_ids.astype("<u4")
    return b"".join([len(ids).to_bytes(4, "little"), ids.tobytes(), teacher.target_mask.tobytes(), places.tobytes()])


def unpack_companion(companion: bytes) -> tuple[Encoded, IntArray, IntArray]:
    """Return the teacher's tokens of an example, and the tokens and offsets of its labelled positions."""
    size = int.from_bytes(companion[:4], "little")
    ids = np.frombuffer(companion, dtype="<u4", count=size, offset=4).astype(np.int64)
    mask = np.frombuffer(companion, dtype=np.uint8, count=size, offset=4 + 4 * size).astype(bool)
    places = np.frombuffer(companion, dtype="<u4", offset=4 + 5 * size).astype(np.int64)
    return Encoded(ids, mask), places >> OFFSET_BITS, places & ((1 << OFFSET_BITS) - 1)


def are_exchanged(student: Encoded, teacher: Encoded, bridge: Bridge) -> bool:
    """Return whether two tokenizations of an example are the same tokens under other ids, with the same targets."""
    return (
        bridge.exchange is not None
        and np.array_equal(bridge.exchange[student.input_ids], teacher.input_ids)
        and np.array_equal(student.target_mask, teacher.target_mask)
    )


def shared_starts(example: Encoded) -> tuple[IntArray, IntArray]:
    """Return the teacher's and the student's tokens that start at the same byte, of an example's labelled positions."""
    teacher, tokens, offsets = unpack_companion(example.companion)
    golds = example.input_ids[1:][example.target_mask[:-1]]
    return teacher.input_ids[tokens][offsets == 0], golds[offsets == 0]
