"""Stage 1 with ``--student-tokenizer``: a cache in the student's vocabulary."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.labels import SparseTargets
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.cache.report.summary import summarize
from logitcask.cache.verify import verify
from logitcask.pipeline.precompute.precompute import precompute
from tests.support.tiny import (
    CHATML,
    RECORDS,
    folder_bytes,
    make_teacher,
    make_tokenizer,
    precompute_settings,
    write_jsonl,
)
from tests.vocabulary.test_rests import sentence_piece

CHATS: list[dict[str, object]] = [
    {
        "messages": [
            {"role": "user", "content": f"How many {n}?"},
            {"role": "assistant", "content": f"There are {n} and more."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Since there are more apples."},
        ]
    }
    for n in range(6)
]
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def student(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def reversed_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Save a tokenizer with the same tokens in the other order."""
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    size = len(tokenizer)
    state["model"]["vocab"] = {token: size - 1 - index for token, index in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS[:8])
    return tmp_path


def cache(folder: Path, name: str, **options: object) -> CacheReader:
    settings = precompute_settings(folder, output=folder / name, **options)
    precompute(settings)
    assert not verify(folder / name).problems
    return CacheReader(folder / name)


def test_the_teachers_own_tokenizer_gives_its_very_labels(data: Path) -> None:
    plain = cache(data, "plain")
    again = cache(data, "again", student_tokenizer=student(data / "student", make_tokenizer()))
    assert len(plain) == len(again)
    for index in range(len(plain)):
        one, other = plain.example(index), again.example(index)
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.target_mask, other.target_mask)
        for name in (field.name for field in fields(SparseTargets)):
            assert np.array_equal(getattr(one.targets, name), getattr(other.targets, name)), name
    part = again.manifest.teacher_tokenizer
    assert part is not None
    assert (part.aligned, part.straddling, part.unlabelled) == (again.manifest.data.positions, 0, 0)
    assert plain.manifest.teacher_tokenizer is None
    info = describe(data / "again")
    assert info.projection is not None
    assert info.projection[0] == info.projection[1]


def test_the_same_tokens_under_other_ids_get_the_same_heads_under_other_ids(data: Path) -> None:
    plain, other = (
        cache(data, "plain"),
        cache(data, "other", student_tokenizer=reversed_ids(data / "s", make_tokenizer())),
    )
    size = other.manifest.label.vocab_size
    for index in range(len(plain)):
        one, two = plain.example(index), other.example(index)
        assert np.array_equal(one.input_ids, size - 1 - two.input_ids)
        assert np.array_equal(one.targets.head_ids, size - 1 - two.targets.head_ids.astype(np.int64))
        for name in ("head_logprobs", "gold_logprobs", "log_tail_mass"):
            np.testing.assert_allclose(getattr(one.targets, name), getattr(two.targets, name), atol=0.126)  # a code


def test_a_cache_in_another_vocabulary_telescopes_and_resumes(data: Path) -> None:
    options = {"student_tokenizer": student(data / "student", make_tokenizer(vocab_size=280)), "shard_positions": 40}
    plain, other = cache(data, "plain"), cache(data, "other", **options)
    part = other.manifest.teacher_tokenizer
    assert part is not None
    assert min(part.aligned, part.straddling) >= 20
    assert part.unlabelled == 0
    assert part.aligned + part.straddling == other.manifest.data.positions > plain.manifest.data.positions
    totals = [
        sorted(float(each.example(i).targets.gold_logprobs.sum()) for i in range(len(each))) for each in (plain, other)
    ]
    np.testing.assert_allclose(totals[0], totals[1], atol=0.0625 * 40)  # half a code per position
    assert abs(sum(totals[0]) - sum(totals[1])) < 8.0
    info = describe(data / "other")
    assert info.projection is not None
    size = len("".join(str(record["response"]) for record in RECORDS[:8]))
    assert info.projection[0] == pytest.approx(-sum(totals[1]) / np.log(2) / size, abs=8 / size)
    assert info.projection[1] > 0
    lines = render(info)
    assert "target positions: 75.3% aligned, 24.7% straddling, 0.0% unlabelled" in lines
    assert f"bits per byte of the text: {info.projection[0]:.3f} by the labels, the teacher's own" in lines
    alone = f"; bits per byte {info.projection[0]:.3f}, by projection alone {info.projection[1]:.3f}"
    assert f"the student's; positions 75.3% aligned, 24.7% straddling, 0.0% unlabelled{alone}" in summarize(info)
    tokenizer = AutoTokenizer.from_pretrained(data / "student")
    text = tokenizer.decode(other.example(0).input_ids)
    assert str(RECORDS[0]["response"])[:8] in text or "There are" in text

    stopped = data / "stopped"
    shutil.copytree(data / "other", stopped)
    shutil.rmtree(stopped / "commits" / "c" / "0")  # as if it had been killed before
    assert precompute(precompute_settings(data, output=stopped, **options)).shards_written == 1
    assert folder_bytes(stopped) == folder_bytes(data / "other")
    report = precompute(
        precompute_settings(data, output=stopped, **{**options, "dtype": "float32", "engine": "transformers"})
    )
    assert report.shards_written == 0
    with pytest.raises(CacheMismatchError, match="tokenizer"):
        precompute(precompute_settings(data, output=stopped, shard_positions=40))


def test_labels_are_the_same_whether_they_are_measured(data: Path) -> None:
    """What is measured is computed for the whole vocabulary, the rest only for tokens that have any probability."""
    other = student(data / "student", sentence_piece([" are", "and", " many"]))
    measured, plain = (
        cache(data, f"{count}", student_tokenizer=other, fidelity_positions=count) for count in (10_000, 0)
    )
    assert measured.manifest.data.positions > 100
    for index in range(len(plain)):
        one, two = measured.example(index).targets, plain.example(index).targets
        some = one.head_logprobs > -50  # tokens of no probability have no order
        assert np.array_equal(one.head_ids[some], two.head_ids[some])
        assert np.array_equal(one.tail_counts, two.tail_counts)
        assert np.array_equal(one.tail_ids[one.tail_counts > 0], two.tail_ids[two.tail_counts > 0])
        for name in ("head_logprobs", "gold_logprobs", "log_tail_mass", "log_partition"):
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=0.126)  # a code


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sentence_piece_with_a_blank_before_each_text_telescopes_too(data: Path, side: str) -> None:
    words = [" are", "and", " many"]
    llama, folder = sentence_piece(words), data / side
    llama.save_pretrained(folder)
    if side == "teacher":
        student(data / "student", make_tokenizer())
    plain, other = cache(data, "plain"), cache(data, "other", student_tokenizer=str(data / "student"))
    part = other.manifest.teacher_tokenizer
    assert part is not None
    assert part.unlabelled == 0
    sums = [
        sorted(float(each.example(i).targets.gold_logprobs.sum()) for i in range(len(each))) for each in (plain, other)
    ]
    np.testing.assert_allclose(sums[0], sums[1], atol=0.0625 * 60)  # half a code per position
    write_jsonl(data / "train.jsonl", [{"text": f"{record['prompt']}{record['response']}"} for record in RECORDS[:8]])
    raw = cache(data, "raw", student_tokenizer=str(data / "student"), max_seq_length=24)
    part = raw.manifest.teacher_tokenizer
    assert part is not None
    assert part.aligned + part.straddling >= 8 * 9  # though the texts are cut


def test_chats_are_rendered_by_the_template_of_each_side(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher", chat=True)
    write_jsonl(tmp_path / "train.jsonl", [*CHATS, *RECORDS[:3]])
    tokenizer = make_tokenizer(vocab_size=290, chat=True)
    tokenizer.chat_template, tokenizer.eos_token = TURNS, "<|endoftext|>"
    other = cache(tmp_path, "cache", student_tokenizer=student(tmp_path / "student", tokenizer), max_seq_length=128)
    part = other.manifest.teacher_tokenizer
    assert part is not None
    assert part.unlabelled == 0
    assert part.straddling > 0
    assert part.chat_template != other.manifest.tokenizer.chat_template
    texts = []
    for index in range(len(other)):
        example = other.example(index)
        texts.append(tokenizer.decode(example.input_ids[1:][example.target_mask[:-1]]))
        assert np.isfinite(example.targets.gold_logprobs).all()
    assert "There are 3 and more.<|endoftext|>Since there are more apples.<|endoftext|>" in texts


def test_what_cannot_be_done_is_one_line(data: Path) -> None:
    assert precompute_settings(data, student_tokenizer="gpt2", engine="auto").engine == "transformers"
    with pytest.raises(ValidationError, match="--student-tokenizer requires --engine transformers, got vllm"):
        precompute_settings(data, student_tokenizer="gpt2", engine="vllm")
    with pytest.raises(ValidationError, match="cannot be combined with --preset exact"):
        precompute_settings(data, student_tokenizer="gpt2", preset="exact", tail_draws=0)
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LogitcaskError, match="keeps texts as they are"):
        cache(data, "cache", student_tokenizer=student(data / "student", lower))
    write_jsonl(data / "train.jsonl", [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    with pytest.raises(LogitcaskError, match="labels in another vocabulary need text"):
        cache(data, "cache", student_tokenizer=student(data / "s2", make_tokenizer(vocab_size=280)))


def test_templates_that_cut_a_chat_otherwise_are_cut_into_turns(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher", chat=True)
    write_jsonl(tmp_path / "train.jsonl", CHATS[:2])
    tokenizer = make_tokenizer(vocab_size=290, chat=True)
    last = "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% else %}...{% endif %}"
    tokenizer.chat_template = CHATML.replace("{{ message['content'] }}", last)  # earlier answers are rewritten
    other = cache(tmp_path, "cache", student_tokenizer=student(tmp_path / "student", tokenizer), max_seq_length=128)
    assert len(other) == 4
    part = other.manifest.teacher_tokenizer
    assert part is not None
    assert part.unlabelled == 0
