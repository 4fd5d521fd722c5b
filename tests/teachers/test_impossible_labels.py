"""No impossible label is ever committed: real teachers that overflow in float16, engines at fault, spoiled shards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.integrity import committed_shards
from logitcask.cache.labels import Example, Shard, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.open import open_store
from logitcask.cache.verify import verify
from logitcask.cache.writer import CacheWriter, create_cache
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.teachers.labelling import label_shard, require_possible
from logitcask.pipeline.teachers.load import TeacherSpec, check_engine
from logitcask.pipeline.teachers.teacher import Labelled, TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher, load_teacher
from logitcask.pipeline.teachers.vllm import _top_k
from tests.cache.test_cache import FILES, label_settings, manifest_of
from tests.support.tiny import (
    RECORDS,
    folder_bytes,
    make_teacher,
    make_tokenizer,
    overflowing_teacher,
    precompute_settings,
    sound_shards,
    write_jsonl,
)

LABEL = label_settings(300, 4, 8)
Change = Callable[[SparseTargets], dict[str, Any]]


def wrong_positions(model: PreTrainedModel, example: Example) -> list[int]:
    """Return the labelled positions of an example at which a model's own logits overflow."""
    with torch.no_grad():
        logits = model(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
    overflows = (logits.isnan() | logits.isposinf()).any(1).numpy()
    return np.flatnonzero(example.target_mask & overflows).tolist()


def run(folder: Path, dtype: str) -> Path:
    write_jsonl(folder / "train.jsonl", RECORDS)
    precompute(precompute_settings(folder, dtype=dtype, output=folder / dtype, fidelity_positions=64))
    return folder / dtype


@pytest.mark.parametrize("in_body", [False, True])
def test_a_float16_teacher_that_overflows_at_some_tokens_is_refused(in_body: bool, tmp_path: Path) -> None:
    """The first wrong label is named, nothing of its shard is there; in other dtypes the same teacher is sound."""
    one, other = (make_tokenizer().encode(str(RECORDS[row]["response"])) for row in (0, 1))
    folder = overflowing_teacher(tmp_path / "teacher", in_body=in_body, tokens=sorted({*one} - {*other}))
    with pytest.raises(LogitcaskError) as refused:
        run(tmp_path, "float16")
    start, _, rest = str(refused.value).partition(", is impossible: ")
    assert rest == (
        f"{'gold' if in_body else 'head'}_logprobs must be at most 0, got nan: the teacher ran in float16: float16 "
        "overflows above 65,504: use bfloat16 or float32"
    )
    reader = CacheReader(run(tmp_path, "float32"))
    assert verify(reader.path).problems == verify(run(tmp_path, "bfloat16")).problems == []
    assert start.startswith("the label of example ")
    index, position = (int(word) for word in start.removeprefix("the label of example ").split(", position "))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    wrong = [wrong_positions(model, reader.example(i)) for i in range(len(reader))]
    assert position == wrong[index][0]
    assert not all(wrong), "all examples overflow"
    count = reader.manifest.shards.count
    left = committed_shards(open_store(tmp_path / "float16", read_only=True), count)
    assert sum(len(reader.shard(shard)) for shard in left) <= index < len(reader)
    assert left == set(range(len(left)))


def test_a_float16_teacher_that_overflows_everywhere_is_refused_for_the_same_reason(tmp_path: Path) -> None:
    overflowing_teacher(tmp_path / "teacher", in_body=True, tokens=list(range(300)))
    with pytest.raises(LogitcaskError) as refused:
        run(tmp_path, "float16")
    assert str(refused.value) == (
        "GraniteForCausalLM: no finite logits from its first 8 tokens in float16: float16 overflows above 65,504: "
        "use bfloat16 or float32"
    )
    assert not (tmp_path / "float16").exists()


class Faulty:
    """A teacher whose engine gives wrong numbers: those of transformers, changed in the second example's third row."""

    def __init__(self, teacher: TransformersTeacher, change: Change) -> None:
        self._teacher, self._change = teacher, change
        identity = teacher.facts.identity.model_copy(update={"engine": "vllm", "dtype": "bfloat16"})
        self.facts = replace(teacher.facts, identity=identity)

    def expect(self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings) -> None:
        pass

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        labels = self._teacher.label(batch, label)
        first, second, *rest = labels.targets
        return Labelled([first, replace(second, **self._change(second)), *rest], labels.fidelity)


def at(name: str, row: int, value: float, column: int | None = None) -> Change:
    """Set a number of a row, or all of them."""

    def change(targets: SparseTargets) -> dict[str, Any]:
        values = getattr(targets, name).copy()
        values[row if column is None else (row, column)] = value
        return {name: values}

    return change


# what is wrong with row 2, and what is said of it
WRONG: dict[str, tuple[Change, str]] = {
    "gold NaN": (at("gold_logprobs", 2, np.nan), "gold_logprobs must be at most 0, got nan"),
    "gold over 0": (at("gold_logprobs", 2, 0.25), "gold_logprobs must be at most 0, got 0.25"),
    "gold infinite": (at("gold_logprobs", 2, np.inf), "gold_logprobs must be at most 0, got inf"),
    "head NaN": (at("head_logprobs", 2, np.nan, 3), "head_logprobs must be at most 0, got nan"),
    "head over 0": (at("head_logprobs", 2, 0.01, 0), "head_logprobs must be at most 0, got 0.01"),
    "head mass over 1": (at("head_logprobs", 2, -0.3), "the masses of head and tail at T=1 must sum to 1, got"),
    "head lost": (at("head_logprobs", 2, -np.inf), "the masses of head and tail at T=1 must sum to 1, got"),
    "draw NaN": (at("tail_logprobs", 2, np.nan, 0), "tail_logprobs must be at most 0, got nan"),
    "draw over 0": (at("tail_logprobs", 2, 1.0, 0), "tail_logprobs must be at most 0, got 1"),
    "draw impossible": (at("tail_logprobs", 2, -np.inf, 0), "tail_logprobs must be finite, got -inf"),
    "partition NaN": (at("log_partition", 2, np.nan, 1), "log_partition must be finite, got nan"),
    "partition infinite": (at("log_partition", 2, -np.inf, 2), "log_partition must be finite, got -inf"),
    "tail mass NaN": (at("log_tail_mass", 2, np.nan, 2), "log_tail_mass must be at most 0, got nan"),
    "tail mass over 1": (at("log_tail_mass", 2, 0.5, 1), "log_tail_mass must be at most 0, got 0.5"),
    "tail mass shifted": (
        at("log_tail_mass", 2, 0.0, 2), "the masses of head and tail at T=2 must sum to 1, got",
    ),
    "tail without mass": (at("log_tail_mass", 2, -np.inf), "the masses of head and tail at T=1 must sum to 1, got"),
    "mass without draws": (
        at("tail_counts", 2, 0), "a tail must have draws if it has mass, and none if not, got 0",
    ),
    "all shifted": (
        lambda t: {"head_logprobs": t.head_logprobs - 1, "log_partition": t.log_partition - 1 / np.array([1, 1.5, 2])},
        "log_partition at T=1 must be 0, got -1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TransformersTeacher:
    folder = make_teacher(tmp_path_factory.mktemp("impossible") / "teacher")
    return load_teacher(str(folder), revision=None, dtype="float32", device="cpu", trust_remote_code=False)


def examples() -> list[TokenizedExample]:
    ids = np.random.default_rng(0).integers(0, 300, (3, 12))
    mask = np.arange(12) % 2 == 1
    mask[-1] = False
    return [TokenizedExample(5 + row, ids[row], mask, np.zeros(5, dtype=bool)) for row in range(3)]


@pytest.mark.parametrize(("change", "problem"), WRONG.values(), ids=WRONG)
def test_what_an_engine_gave_is_checked_and_named(change: Change, problem: str, teacher: TransformersTeacher) -> None:
    def spoil(targets: SparseTargets) -> dict[str, Any]:
        changed = change(targets)
        if problem.startswith("log_partition at T=1"):  # all rows, in this example
            return {
                name: np.where(np.arange(5)[:, None] < 2, getattr(targets, name), changed[name]) for name in changed
            }
        return changed

    sound = label_shard(Faulty(teacher, lambda targets: {}), [examples()], LABEL, lambda count: None)
    assert len(sound.targets) == 15
    faulty = Faulty(teacher, spoil)
    with pytest.raises(LogitcaskError) as refused:
        label_shard(faulty, [examples()], LABEL, lambda count: None)
    start = f"the label of example 6, position 5, is impossible: {problem}"
    assert str(refused.value).startswith(start)
    assert str(refused.value).endswith(
        "the teacher ran in bfloat16: use float32, or another model if that is no better"
    )
    spec = TeacherSpec("", None, "vllm", "auto", "cpu", 12, 1, False, 4)
    with pytest.raises(LogitcaskError) as of_check:
        check_engine(faulty, spec, examples(), LABEL)
    assert str(of_check.value) == str(refused.value)


Made = tuple[CacheWriter, list[Shard]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A cache of two shards, the first of them written, and its shards."""
    shards = sound_shards(LABEL, [2, 3])
    manifest, shard_examples = manifest_of(LABEL, shards)
    writer = create_cache(tmp_path_factory.mktemp("made") / "cache", manifest, shard_examples, FILES)
    writer.write_shard(0, shards[0])
    return writer, shards


@pytest.mark.parametrize(("change", "problem"), WRONG.values(), ids=WRONG)
def test_the_writer_refuses_a_wrong_shard_whoever_made_it(change: Change, problem: str, made: Made) -> None:
    writer, (_, good) = made
    bad = replace(good, targets=replace(good.targets, **change(good.targets)))
    with pytest.raises(LogitcaskError) as refused:
        writer.write_shard(1, bad)
    row = 0 if problem.startswith("log_partition at T=1") else 2
    example = int(np.searchsorted(np.cumsum(bad.position_count), row, side="right"))
    before = int(bad.position_count[:example].sum())
    position = int(np.flatnonzero(bad.example(example).target_mask)[row - before])
    start = f"shard 1 is not written: the label of its example {example}, position {position}, is impossible: {problem}"
    assert str(refused.value).startswith(start)
    assert str(refused.value).endswith("; the teacher ran in float32: use bfloat16 or float32")
    assert writer.missing_shards() == [1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda s: {"targets": replace(s.targets, head_ids=s.targets.head_ids + 300)},
            "is outside the vocabulary of 300",
        ),
        (lambda s: {"input_ids": s.input_ids + 300}, "is outside the vocabulary of 300"),
        (lambda s: {"target_mask": s.target_mask | True}, "target_mask and position_count disagree"),
        (lambda s: {"fidelity": FidelitySums(np.full(3, np.nan, np.float32))}, "fidelity: must be finite"),
    ],
)
def test_the_writer_refuses_what_readers_would(
    change: Callable[[Shard], dict[str, Any]], problem: str, made: Made
) -> None:
    """Ids beyond 16 bits would be stored as other tokens' ids."""
    writer, (_, good) = made
    with pytest.raises(LogitcaskError, match=problem):
        writer.write_shard(1, replace(good, **change(good)))
    assert writer.missing_shards() == [1]


def test_a_refused_shard_leaves_nothing_and_a_sound_one_can_follow(tmp_path: Path) -> None:
    shards = sound_shards(LABEL, [2])
    manifest, shard_examples = manifest_of(LABEL, shards)
    writer = create_cache(tmp_path / "cache", manifest, shard_examples, FILES)
    before = folder_bytes(tmp_path)
    with pytest.raises(LogitcaskError):
        writer.write_shard(
            0, replace(shards[0], targets=replace(shards[0].targets, **WRONG["gold NaN"][0](shards[0].targets)))
        )
    assert folder_bytes(tmp_path) == before
    writer.write_shard(0, shards[0])
    assert verify(tmp_path / "cache").problems == []


def entries(values: Sequence[float], ids: Sequence[int], gold: tuple[int, float]) -> dict[int, Any]:
    """Return a row of prompt log-probabilities as vLLM gives them: by token id, with a rank."""
    row = {
        token: SimpleNamespace(logprob=value, rank=rank)
        for rank, (token, value) in enumerate(zip(ids, values, strict=True), 1)
    }
    return {**row, gold[0]: row.get(gold[0], SimpleNamespace(logprob=gold[1], rank=99))}


@pytest.mark.parametrize(
    ("values", "gold", "problem"),
    [
        ([-0.7, -1.5, -2.0, -3.0], -4.0, None),
        ([0.4, -1.5, -2.0, -3.0], -4.0, "head_logprobs must be at most 0, got 0.4"),
        ([-0.7, float("nan"), -2.0, -3.0], -4.0, "head_logprobs must be at most 0, got nan"),
        ([-0.7, -1.5, -2.0, -3.0], 0.5, "gold_logprobs must be at most 0, got 0.5"),
        ([-0.7, -0.7, -2.0, -3.0], -4.0, "the masses of head and tail at T=1 must sum to 1, got 1.1966"),
    ],
)
def test_vllms_own_numbers_are_checked(values: list[float], gold: float, problem: str | None) -> None:
    label = LabelSettings(vocab_size=300, head_size=4, tail_draws=0, temperatures=[1.0], seed=0, fidelity_positions=0)
    example = TokenizedExample(3, np.array([4, 9, 2]), np.array([True, True, False]), np.zeros(2, dtype=bool))
    sound = [-0.7, -1.5, -2.0, -3.0]
    ids = [5, 6, 7, 8]
    rows = [None, entries(sound, ids, (9, -4.0)), entries(values, ids, (2, gold))]
    targets = _top_k(rows, example, label)
    if problem is None:
        require_possible([example], [targets], label, "bfloat16")
        np.testing.assert_allclose(
            np.exp(targets.log_tail_mass[:, 0]) + np.exp(targets.head_logprobs).sum(1), 1, rtol=1e-6
        )
        return
    with pytest.raises(LogitcaskError) as refused:
        require_possible([example], [targets], label, "bfloat16")
    assert str(refused.value).startswith(f"the label of example 3, position 1, is impossible: {problem}")


def test_an_id_beyond_the_tokenizers_leaves_no_gap_in_vllms_head() -> None:
    """The next token, which vLLM adds whatever its rank, must not take the place of one of the K most probable."""
    label = LabelSettings(vocab_size=300, head_size=4, tail_draws=0, temperatures=[1.0], seed=0, fidelity_positions=0)
    example = TokenizedExample(3, np.array([4, 9]), np.array([True, False]), np.zeros(1, dtype=bool))
    rows = [None, entries([-0.7, -1.5, -2.0, -3.0], [5, 6, 7, 300], (9, -4.0))]
    with pytest.raises(LogitcaskError, match="vLLM gave 3 of 4 tokens at example 3, position 0: the others are beyond"):
        _top_k(rows, example, label)
