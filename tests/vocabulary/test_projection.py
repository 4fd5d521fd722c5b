"""Labels in another vocabulary, against brute force in float64 on small vocabularies.

The teacher is any function from the tokens before to logits: it is known exactly, and read at whatever tokens.
"""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.alignment import align, pack_companion, shared_starts, unpack_companion
from logitcask.pipeline.vocabulary.bridge import Bridge
from logitcask.pipeline.vocabulary.covers import CoverFinder
from logitcask.pipeline.vocabulary.projection import Projector, pieces, whole_vocabulary
from logitcask.pipeline.vocabulary.rests import make_bridge
from logitcask.pipeline.vocabulary.spread import Spread, spread_alone, spread_counted
from tests.vocabulary.test_rests import sentence_piece

LETTERS = "ab c"
END = "<end>"


def tokenizer(words: list[str], reverse: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of all bytes and these words, merged in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, tokens = list[tuple[str, str]](), [END, *alphabet]
    for word in words:
        text = word.replace(" ", "Ġ")
        if text in tokens:
            continue
        cut = next((i for i in range(len(text) - 1, 0, -1) if text[:i] in tokens and text[i:] in tokens), None)
        if cut is None:
            continue
        merges.append((text[:cut], text[cut:]))
        tokens.append(text)
    if reverse:
        tokens.reverse()
    model = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END)


def teacher_logits(before: list[int], size: int) -> NDArray[np.float64]:
    """Return the logits after some tokens: any, but always the same."""
    seed = int.from_bytes(hashlib.sha256(str(before).encode()).digest()[:8], "little")
    logits: NDArray[np.float64] = np.random.default_rng(seed).normal(0.0, 2.0, size)
    return logits


def encoded(tok: PreTrainedTokenizerFast, text: str) -> Encoded:
    ids = np.array([tok.eos_token_id, *tok.encode(text, add_special_tokens=False), tok.eos_token_id])
    return Encoded(ids, np.arange(len(ids)) < len(ids) - 1)


def project(
    bridge: Bridge, student: Encoded, teacher: Encoded, most: int, spread: Spread | None = None
) -> NDArray[np.float64]:
    """Return the log-probabilities of all labelled positions, (N, U)."""
    alignment = align(student, teacher, bridge)
    again, places, offsets = unpack_companion(pack_companion(teacher, alignment))
    assert np.array_equal(again.input_ids, teacher.input_ids)
    assert np.array_equal(places, alignment.tokens)
    labelled = Encoded(student.input_ids, alignment.labelled)
    positions = CoverFinder(bridge).positions(labelled, again, places, offsets, 0)
    ids, size = teacher.input_ids, len(bridge.teacher)
    logits = np.stack([teacher_logits(ids[: at + 1].tolist(), size) for at in np.flatnonzero(teacher.target_mask)])
    own = ids[np.flatnonzero(teacher.target_mask) + 1]
    projector = Projector(bridge, torch.device("cpu"), spread)
    parts = []
    for piece in pieces(positions, most):
        rows = slice(piece.first, piece.stop)
        log_q, tokens, sums = projector(torch.from_numpy(logits[rows]), own[rows], piece)
        parts.append(whole_vocabulary(log_q, tokens, len(bridge.student)).double().numpy())
        golds = [position.gold for position in piece.positions]
        assert sums[0] == sum(len(bridge.student[gold] or b"") for gold in golds)
        assert sums[1] == pytest.approx(-parts[-1][np.arange(len(golds)), golds].sum(), abs=1e-4)
    return np.concatenate(parts)


def softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    p: NDArray[np.float64] = np.exp(z - z.max())
    p /= p.sum()
    return p


def likelihood(teacher: Encoded, size: int) -> float:
    """Return the teacher's log-probability of a text and its end."""
    ids = teacher.input_ids.tolist()
    return float(sum(np.log(softmax(teacher_logits(ids[:at], size))[ids[at]]) for at in range(1, len(ids))))


def byte_distribution(bridge: Bridge, teacher: Encoded, text: bytes, place: int) -> NDArray[np.float64]:
    """Return the teacher's distribution of the byte at a place, (256,), of the end, and of what is not known, (258,).

    Every token is looked at that the teacher could have written before the place, after its own tokens of the text.
    """
    ids, size = teacher.input_ids.tolist(), len(bridge.teacher)
    found, before, start = np.zeros(258), 1.0, 0
    for at in range(1, len(ids)):
        p = softmax(teacher_logits(ids[:at], size))
        for token, own in enumerate(bridge.teacher):
            if own is None:
                found[256] += before * p[token] * (start == place and token == ids[-1])
            elif start + len(own) > place and own[: place - start] == text[start:place]:
                found[own[place - start]] += before * p[token]
            elif own == text[start:place] and token != ids[at]:
                found[257] += before * p[token]
        before *= p[ids[at]]
        start += len(bridge.teacher[ids[at]] or b"")
        if start > place:
            break
    found /= found.sum()
    return found


def words(draw: st.DrawFn) -> list[str]:
    return draw(st.lists(st.text(LETTERS, min_size=2, max_size=4), max_size=12))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], list[str], str]:
    return words(draw), words(draw), draw(st.text(LETTERS, min_size=1, max_size=14))


def require_sums_and_chain(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, text: str) -> None:
    """Require that each label sums to 1, and that those of a text's own tokens multiply to the teacher's likelihood."""
    bridge = make_bridge(teacher, student, None)
    own, other = encoded(student, text), encoded(teacher, text)
    log_q = project(bridge, own, other, 100)
    assert len(log_q) == len(own.input_ids) - 1
    np.testing.assert_allclose(np.exp(log_q).sum(1), 1.0, atol=1e-5)
    chain = log_q[np.arange(len(log_q)), own.input_ids[1:]].sum()
    assert chain == pytest.approx(likelihood(other, len(bridge.teacher)), abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(cases())
def test_sums_to_one_and_telescopes_to_the_teachers_likelihood(case: tuple[list[str], list[str], str]) -> None:
    ours, theirs, text = case
    teacher, student = tokenizer(ours), tokenizer(theirs, reverse=True)
    require_sums_and_chain(teacher, student, text)
    bridge, own, other = make_bridge(teacher, student, None), encoded(student, text), encoded(teacher, text)
    whole, parts = project(bridge, own, other, 100), project(bridge, own, other, 3)
    np.testing.assert_allclose(np.exp(parts), np.exp(whole), atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(cases(), st.booleans())
@example(([" a"], ["a b", " ab"], "a  \u00e9\u00eab"), True)  # characters without a token of their own
def test_a_student_with_sentence_piece_and_byte_fallback(case: tuple[list[str], list[str], str], swapped: bool) -> None:
    ours, theirs, text = case
    sides = tokenizer([*ours, "\u00c3\u00a9"]), sentence_piece(theirs, prefix=False)
    teacher, student = sides[::-1] if swapped else sides
    require_sums_and_chain(teacher, student, text)


@settings(deadline=None, max_examples=25)
@given(cases(), st.booleans())
@example(([" a", "  "], [], "  a"), False)  # a cover as long as the longest token
def test_a_student_of_characters_gets_the_teachers_distribution_of_bytes(
    case: tuple[list[str], list[str], str], in_pieces: bool
) -> None:
    ours, _, text = case
    teacher, student = tokenizer(ours), sentence_piece([], prefix=False) if in_pieces else tokenizer([])
    bridge = make_bridge(teacher, student, None)
    own, other = encoded(student, text), encoded(teacher, text)
    q = np.exp(project(bridge, own, other, 100))
    columns = [student.encode(chr(byte), add_special_tokens=False)[0] for byte in range(128)]
    columns += [student.eos_token_id]
    for place in range(len(text) + 1):
        expected = byte_distribution(bridge, other, text.encode(), place)
        known, unknown = expected[[*range(128), 256]], expected[257]
        gold = 128 if place == len(text) else ord(text[place])
        assert q[place, columns[gold]] == pytest.approx(known[gold], abs=1e-5)
        more = q[place, columns] - known
        assert more.min() > -1e-5
        assert more.sum() <= unknown + 1e-5
        if unknown == 0:
            np.testing.assert_allclose(q[place, columns], known, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(cases())
def test_the_same_tokens_under_other_ids_get_the_same_labels_under_other_ids(
    case: tuple[list[str], list[str], str],
) -> None:
    ours, _, text = case
    teacher, student = tokenizer(ours), tokenizer(ours, reverse=True)
    assume(all(len(student.encode(word, add_special_tokens=False)) == 1 for word in ours))  # it writes all its tokens
    bridge = make_bridge(teacher, student, None)
    assert bridge.exchange is not None
    own, other = encoded(student, text), encoded(teacher, text)
    assert np.array_equal(bridge.exchange[own.input_ids], other.input_ids)
    q = np.exp(project(bridge, own, other, 100))
    ids, size = other.input_ids.tolist(), len(bridge.teacher)
    expected = np.stack([softmax(teacher_logits(ids[:at], size)) for at in range(1, len(ids))])
    np.testing.assert_allclose(q, expected[:, bridge.exchange], atol=1e-6)


def test_a_long_token_of_the_student_gets_the_mass_of_what_the_teacher_writes_in_pieces() -> None:
    teacher, student = tokenizer(["ab"]), tokenizer(["ab", "abc"])
    bridge = make_bridge(teacher, student, None)
    own, other = encoded(student, "abc"), encoded(teacher, "abc")
    q = np.exp(project(bridge, own, other, 100))
    ids, size = other.input_ids.tolist(), len(bridge.teacher)
    p_ab, p_c = (softmax(teacher_logits(ids[:at], size))[ids[at]] for at in (1, 2))
    gold, short = own.input_ids[1], student.encode("ab", add_special_tokens=False)[0]
    assert q[0, gold] == pytest.approx(p_ab * p_c, rel=1e-5)
    assert q[0, short] == pytest.approx(p_ab * (1 - p_c), rel=1e-4)  # and not once more where it was not continued


def test_what_the_texts_say_is_counted() -> None:
    teacher, student = tokenizer(["ab"]), tokenizer(["ab", "abc"])
    bridge = make_bridge(teacher, student, None)
    sides = ((teacher, "ab"), (student, "ab"), (student, "abc"))
    ab, short, long_ = (side.encode(text, add_special_tokens=False)[0] for side, text in sides)
    staged = []
    for text in ["abc"] * 6 + ["ab b"] * 3:
        own, other = encoded(student, text), encoded(teacher, text)
        staged.append(replace(own, companion=pack_companion(other, align(own, other, bridge))))
    alone, counted = spread_alone(bridge), spread_counted(bridge, map(shared_starts, staged))
    for spread, expected in ((alone, {short: 1.0}), (counted, {short: 0.4, long_: 0.6})):  # (3 + 1) / 10, 6 / 10
        at = np.flatnonzero(spread.tokens == ab)
        assert dict(zip(spread.firsts[at].tolist(), spread.weights[at].tolist(), strict=True)) == pytest.approx(
            expected
        )
        sums = np.bincount(spread.tokens, spread.weights)
        np.testing.assert_allclose(sums[sums > 0], 1.0, rtol=1e-6)
    own, other = encoded(student, "ab ab"), encoded(teacher, "ab ab")
    q = [np.exp(project(bridge, own, other, 100, spread)) for spread in (alone, counted)]
    assert q[0][0, long_] == 0.0
    np.testing.assert_allclose(q[1].sum(1), 1.0, atol=1e-5)
    assert q[1][0, short] == pytest.approx(q[0][0, short], rel=1e-5)  # the text's own token


def test_pieces_hold_no_more_rows_than_asked() -> None:
    teacher, student = tokenizer(["ab", "abc", " a"]), tokenizer(["bc", "bca"])
    bridge = make_bridge(teacher, student, None)
    text = "abc abcabca a" * 4
    own, other = encoded(student, text), encoded(teacher, text)
    alignment = align(own, other, bridge)
    found = CoverFinder(bridge).positions(own, other, alignment.tokens, alignment.offsets, 0)
    cut = list(pieces(found, 8))
    assert len(cut) > 3
    assert max(piece.stop - piece.first for piece in cut) <= 8
    assert list(itertools.chain.from_iterable(piece.positions for piece in cut)) == found
