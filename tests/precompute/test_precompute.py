"""Stage 1 as a whole: killed, resumed, repeated, refused, overwritten."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.labels import Shard, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.writer import CacheWriter
from logitcask.pipeline.plan.dry_run import dry_run
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers import labelling
from logitcask.pipeline.teachers.sparsify import sparsify
from logitcask.pipeline.teachers.teacher import Labelled, TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, precompute_settings, write_jsonl


def spy_on_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[TokenizedExample]]:
    """Return a list that collects every batch that teachers label, in order."""
    asked: list[list[TokenizedExample]] = []
    label = TransformersTeacher.label

    def spy(self: TransformersTeacher, batch: Sequence[TokenizedExample], settings: LabelSettings) -> Labelled:
        asked.append(list(batch))
        return label(self, batch, settings)

    monkeypatch.setattr(TransformersTeacher, "label", spy)
    return asked


def test_each_example_is_labelled_once_under_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws are keyed by its index."""
    asked = spy_on_batches(monkeypatch)
    reader = CacheReader(make_cache(tmp_path))
    examples = [example for batch in asked for example in batch]
    assert sorted(example.index for example in examples) == list(range(len(reader)))
    for example in examples:
        np.testing.assert_array_equal(reader.example(example.index).input_ids, example.input_ids)


def places(batches: list[list[TokenizedExample]]) -> list[list[int]]:
    return [[example.index for example in batch] for batch in batches]


class Stopped(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("moment", [1, 2, 9, 24, 25, 38, 39, 66, 80])
def test_killed_and_resumed_is_byte_for_byte_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Stop instead of writing object ``moment`` of 80: 24 to set up, then 13 per shard and its commit record."""
    teacher = make_teacher(tmp_path / "teacher")
    asked = spy_on_batches(monkeypatch)
    small = {"batch_size": 1, "max_seq_length": 32}  # so that a shard is several batches
    whole = make_cache(tmp_path, teacher, output=tmp_path / "whole", **small)
    batches = list(asked)
    killed = tmp_path / "killed"
    again = precompute_settings(tmp_path, teacher_model=str(teacher), output=killed, **small)
    objects, written, write_shard, put = [0], list[int](), CacheWriter.write_shard, LocalStore.set

    async def stop(self: LocalStore, key: str, value: Buffer) -> None:
        objects[0] += 1
        if objects[0] == moment:
            raise Stopped
        await put(self, key, value)

    def count(self: CacheWriter, index: int, shard: Shard) -> None:
        written.append(index)
        write_shard(self, index, shard)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "set", stop)
        with pytest.raises(Stopped):
            precompute(again)
    killed.mkdir(exist_ok=True)
    for left in (killed / "zarr.1f.partial", *(folder / "0.1f.partial" for folder in killed.glob("tail_ids/c"))):
        left.write_bytes(b"half")
    monkeypatch.setattr(CacheWriter, "write_shard", count)
    asked.clear()
    report = precompute(again)
    committed = max(0, moment - 25) // 14
    labelled = asked[1:] if committed else asked  # after an example whose labels are compared with those that are there
    assert places(labelled) == places(batches)[-len(labelled) :]  # batches are planned from the data, not from progress
    assert (report.shards_found, written) == (committed, list(range(committed, 4)))
    assert folder_bytes(killed) == folder_bytes(whole)


def test_two_runs_give_the_same_bytes_and_another_batch_size_too(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    caches = [make_cache(tmp_path, teacher, output=tmp_path / name) for name in ("a", "b")]
    assert folder_bytes(caches[0]) == folder_bytes(caches[1])
    other = make_cache(tmp_path, teacher, output=tmp_path / "c", batch_size=1)
    a, b = CacheReader(caches[0]), CacheReader(other)
    for index in range(len(a)):
        np.testing.assert_array_equal(a.example(index).targets.tail_ids, b.example(index).targets.tail_ids)


def test_a_different_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    shutil.rmtree(cache / "commits/c/0")
    changes = {"head_size": 5, "tail_draws": 9, "temperatures": (1.0, 3.0), "seed": 4}
    before = folder_bytes(cache)
    with pytest.raises(CacheMismatchError) as caught:
        precompute(precompute_settings(tmp_path, **changes))
    for name in (
        "label.head_size: cache has 4, this run has 5",
        "label.tail_draws",
        "label.temperatures",
        "label.seed",
    ):
        assert name in str(caught.value)
    assert "teacher" not in str(caught.value).split("holds a cache", 1)[1]
    assert folder_bytes(cache) == before
    make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights"):
        precompute(precompute_settings(tmp_path, teacher_model=str(tmp_path / "other")))
    write_jsonl(tmp_path / "train.jsonl", RECORDS[1:])
    with pytest.raises(CacheMismatchError, match=r"data\.examples: cache has 24, this run has 23"):
        precompute(precompute_settings(tmp_path))


def test_overwrite_leaves_nothing_of_the_old_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, head_size=0)
    fresh = make_cache(tmp_path, tmp_path / "teacher", output=tmp_path / "fresh", tail_draws=0)
    make_cache(tmp_path, tmp_path / "teacher", output=cache, tail_draws=0, overwrite=True)
    assert folder_bytes(cache) == folder_bytes(fresh)
    assert not (cache / "tail_ids").exists()


def test_parquet_gives_the_same_cache_as_jsonl(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    datasets.Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "train.parquet"))
    other = make_cache(
        tmp_path, tmp_path / "teacher", train_data=str(tmp_path / "train.parquet"), output=tmp_path / "other"
    )
    assert folder_bytes(other) == folder_bytes(cache)


def test_logits_in_memory_are_bounded_at_any_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head runs on target positions only, at most a slice of them at a time."""
    seen: list[int] = []

    def spy(logits: torch.Tensor, *rest: Any) -> SparseTargets:
        seen.append(logits.shape[0])
        return sparsify(logits, *rest)

    monkeypatch.setattr(labelling, "sparsify", spy)
    monkeypatch.setattr(labelling, "HOST_LOGITS", 300 * 7)
    cache = make_cache(tmp_path, batch_size=64, shard_positions=10_000)
    assert max(seen) == 7
    assert sum(seen) == CacheReader(cache).manifest.data.positions


def test_overwrite_without_an_existing_cache(tmp_path: Path) -> None:
    assert folder_bytes(make_cache(tmp_path, overwrite=True))


def test_responses_written_by_others_get_the_teachers_labels(tmp_path: Path) -> None:
    """Labels cover only the response and its end, leave the text unchanged, and match the model itself."""
    answers = [{"id": n, "prompt": f"Say {word}.", "response": f" {word}!"} for n, word in enumerate(("figs", "eggs"))]
    data, folder = write_jsonl(tmp_path / "answers.jsonl", answers), make_teacher(tmp_path / "teacher")
    reader = CacheReader(make_cache(tmp_path, folder, train_data=str(data), head_size=4))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = {}
    for answer in answers:
        prompt, response = (tokenizer.encode(answer[name]) for name in ("prompt", "response"))
        wanted[(*prompt, *response, tokenizer.eos_token_id)] = len(prompt)
    for index in range(len(answers)):
        example = reader.example(index)
        begin = wanted.pop(tuple(example.input_ids.tolist()))
        np.testing.assert_array_equal(np.flatnonzero(example.target_mask), range(begin - 1, len(example.input_ids) - 1))
        ids = torch.tensor(example.input_ids)
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, begin - 1 : -1].log_softmax(1)
        np.testing.assert_array_equal(example.targets.head_ids, log_probs.topk(4).indices)
        gold = log_probs.gather(1, ids[begin:, None])[:, 0]
        np.testing.assert_allclose(example.targets.gold_logprobs, gold, atol=1 / 15)
    assert not wanted


def test_the_usual_length_is_what_the_teacher_takes_and_a_resumed_cache_keeps_its_own(tmp_path: Path) -> None:
    """A dry run counts the same; a length that is asked for is never lowered."""
    teacher = make_teacher(tmp_path / "teacher", max_length=40)
    write_jsonl(tmp_path / "train.jsonl", [*RECORDS, {"text": "a b c " * 40}])
    given = precompute_settings(tmp_path, teacher_model=str(teacher)).model_dump(exclude_unset=True)
    del given["max_seq_length"]
    usual = PrecomputeSettings.model_validate(given)
    assert dry_run(usual).truncated == 1
    data = precompute(usual).manifest.data
    assert (data.max_seq_length, data.longest, data.truncated) == (40, 40, 1)
    with pytest.raises(LogitcaskError, match="--max-seq-length 1024 is more than the teacher's 40"):
        precompute(PrecomputeSettings.model_validate({**given, "max_seq_length": 1024, "output": tmp_path / "asked"}))
    short = {**given, "output": tmp_path / "short"}
    whole = precompute(PrecomputeSettings.model_validate({**short, "max_seq_length": 24}))
    again = precompute(PrecomputeSettings.model_validate(short))
    assert again.manifest == whole.manifest
    assert again.shards_written == 0
