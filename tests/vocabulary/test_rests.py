"""The bytes of tokens, what a student's tokenizer makes of them, and the alignment of texts that differ."""

import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.alignment import align
from logitcask.pipeline.vocabulary.bridge import NONE
from logitcask.pipeline.vocabulary.rests import first_tokens, make_bridge
from logitcask.pipeline.vocabulary.token_bytes import token_bytes
from tests.support.tiny import make_tokenizer

SPECIALS = ("<s>", "</s>")


def sentence_piece(words: list[str], *, prefix: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2's: blanks as marks, bytes for what has no token, a blank before a text."""
    single = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *single]
    merges = []
    for word in words:
        marked = word.replace(" ", "\u2581")
        for size in range(2, len(marked) + 1):
            if marked[:size] not in tokens:
                tokens.append(marked[:size])
                merges.append((marked[: size - 1], marked[size - 1]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    marks = normalizers.Replace(" ", "\u2581")
    model.normalizer = normalizers.Sequence([*([normalizers.Prepend("\u2581")] if prefix else []), marks])
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("tokenizer", [make_tokenizer(chat=True), sentence_piece(["the", " the", " cat"])])
def test_the_bytes_of_tokens_give_back_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = token_bytes(tokenizer)
    assert all(texts[index] is None for index in tokenizer.all_special_ids)
    for text in ("the cat\n  sat, naïvely 🙂", "日本\t", "x"):
        assert b"".join(texts[index] or b"" for index in ids_of(tokenizer, text)).removeprefix(b" ") == text.encode()


def test_a_rest_is_cut_as_the_student_cuts_a_text_that_goes_on() -> None:
    teacher, student = make_tokenizer(), sentence_piece(["the", " the", " there", " cat"])
    bridge = make_bridge(teacher, student, None)
    there = next(index for index, text in enumerate(bridge.teacher) if text == b"There")
    firsts = bridge.firsts[bridge.starts[there] : bridge.starts[there + 1]]
    assert [bridge.student[first] for first in firsts] == [b"T", b"h", b"e", b"r", b"e"]
    begins = {text: bridge.student[int(first)] for text, first in zip(bridge.teacher, bridge.whole, strict=True)}
    assert begins[b" more"] == b" "
    assert begins[b"\xff"] == b"\xff"
    assert bridge.whole[teacher.eos_token_id] == student.eos_token_id
    rests = [first for text, first in zip(bridge.teacher, bridge.whole, strict=True) if text]
    assert min(rests) > NONE


def test_runs_of_marks_and_the_end_of_a_turn_are_known_as_gemmas_files_have_them() -> None:
    gemma, teacher = sentence_piece(["the", " the", "  "], prefix=False), make_tokenizer(chat=True)
    gemma.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\u2581\u2581", "<end>")])
    gemma.chat_template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    run, end = gemma.convert_tokens_to_ids(["\u2581\u2581", "<end>"])
    assert run in ids_of(gemma, "the  the")
    texts = token_bytes(gemma)
    assert (texts[run], texts[end]) == (b"  ", None)
    bridge = make_bridge(teacher, gemma, None)
    assert bridge.whole[teacher.eos_token_id] == end
    assert bridge.ends[1] == {end, gemma.eos_token_id}


def test_bytes_that_are_no_text_begin_with_the_token_that_is_written_not_with_its_byte() -> None:
    student = sentence_piece(["the"], prefix=False)
    texts = [b" \xe2\x80", b"the\xf0", b"\xe2\x80", b" "]
    firsts = first_tokens(texts, student, token_bytes(student))
    assert student.convert_ids_to_tokens(firsts.tolist()) == ["\u2581", "the", "<0xE2>", "\u2581"]


def test_a_tokenizer_that_changes_texts_is_refused() -> None:
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LogitcaskError, match="do not give back a text"):
        token_bytes(lower)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(LogitcaskError, match="keeps texts as they are"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))


def test_the_table_of_a_pair_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_tokenizer(), sentence_piece([" more", " and"])
    first = make_bridge(*pair, tmp_path / "tables")
    (file,) = (tmp_path / "tables").iterdir()
    monkeypatch.setattr("logitcask.pipeline.vocabulary.rests.first_tokens", None)  # not called again
    assert np.array_equal(make_bridge(*pair, tmp_path / "tables").firsts, first.firsts)
    monkeypatch.undo()
    for left in (file.read_bytes()[:-8], b""):
        file.write_bytes(left)
        assert np.array_equal(make_bridge(*pair, tmp_path / "tables").firsts, first.firsts)  # made anew
    assert os.stat(file).st_size == first.firsts.nbytes + 128
    (tmp_path / "file").write_text("")
    make_bridge(*pair, tmp_path / "file" / "tables")  # which cannot be: it is not kept


def example(tokenizer: PreTrainedTokenizerFast, *parts: tuple[str, bool], end: bool = True) -> Encoded:
    """Return segments of text, targets or not, then the end token, a target."""
    ids, targets = list[int](), list[bool]()
    for text, target in parts:
        ids += ids_of(tokenizer, text)
        targets += [target] * (len(ids) - len(targets))
    ids += [tokenizer.eos_token_id] * end
    targets += [True] * end
    return Encoded(np.array(ids), np.array([*targets[1:], False]))


def places(
    student: Encoded, teacher: Encoded, pair: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> list[tuple[bytes | None, bytes | None, int]]:
    bridge = make_bridge(*pair, None)
    found = align(student, teacher, bridge)
    golds = student.input_ids[np.flatnonzero(found.labelled) + 1].tolist()
    tokens = teacher.input_ids[found.tokens].tolist()
    return [
        (bridge.student[g], bridge.teacher[t], o) for g, t, o in zip(golds, tokens, found.offsets.tolist(), strict=True)
    ]


def test_answers_are_aligned_whatever_stands_before_them() -> None:
    teacher, student = make_tokenizer(), sentence_piece(["an", "and"], prefix=False)
    theirs = example(teacher, ("Q: how?\nA:", False), (" and more", True))
    ours = example(student, ("how", False), (" and more", True))
    assert places(ours, theirs, (teacher, student)) == [
        (b" ", b" and", 0),
        (b"and", b" and", 1),
        (b" ", b" more", 0),
        *[(letter.encode(), b" more", 1 + at) for at, letter in enumerate("more")],
        (None, None, 0),
    ]


@pytest.mark.parametrize("marks", ["normalizer", "pre-tokenizer", ""])
@pytest.mark.parametrize("begins", [(True, True), (True, False), (False, True)])
def test_raw_text_is_aligned_though_it_is_cut_whatever_stands_before_it(marks: str, begins: tuple[bool, bool]) -> None:
    """One side's tokenizer may put a blank there, and the first token is predicted only after a begin token."""
    teacher, student = make_tokenizer(), sentence_piece(["the", " the", " cat"], prefix=marks == "normalizer")
    if marks == "pre-tokenizer":
        student.backend_tokenizer.normalizer = None
        student.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    for sides in ((student, teacher), (teacher, student)):
        for texts in (("the cat and the", "the cat and"), ("the cat and", "the cat and the"), (" the cat", " the ca")):
            ours, theirs = (
                Encoded(
                    np.array(ids := [side.eos_token_id] * begin + ids_of(side, text)),
                    np.arange(1, 1 + len(ids)) < len(ids),
                )
                for side, text, begin in zip(sides, texts, begins, strict=True)
            )
            found = places(ours, theirs, (sides[1], sides[0]))
            least = len(min(texts, key=len)) - len("the ")
            assert sum(len(own or b"") for own, _, _ in found) >= least
            assert all(
                own and other and (other[at:].startswith(own) or own.startswith(other[at:])) for own, other, at in found
            )


def test_where_texts_differ_nothing_is_labelled() -> None:
    teacher, student = make_tokenizer(), sentence_piece([], prefix=False)
    theirs = example(teacher, ("?", False), ("aa think bb", True))
    ours = example(student, ("?", False), ("aa x bb", True))
    labelled = [each[0] for each in places(ours, theirs, (teacher, student))]
    assert labelled == [b"a", b"a", b" ", b" ", b"b", b"b", None]
    cut = example(teacher, ("?", False), ("aa th", True), end=False)  # truncated: what ends it is no end
    assert [each[0] for each in places(ours, cut, (teacher, student))] == [b"a", b"a", b" "]
