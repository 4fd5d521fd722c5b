"""A half-done cache is finished after upgrades, from another folder, on another day; a complete one is left alone."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.cache.verify import verify
from logitcask.cache.writer import CacheWriter, create_cache
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.precompute.ray import _compared
from logitcask.pipeline.teachers.load import load_transformers
from logitcask.pipeline.teachers.teacher import teacher_id
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_files
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, precompute_settings, write_jsonl

STORED = Path(__file__).parents[1] / "cache/stored/format4.zip"


def drop_shards(cache: Path, *shards: int) -> None:
    for shard in shards:
        shutil.rmtree(cache / f"commits/c/{shard}")


def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other patch versions, another build."""
    monkeypatch.setattr("logitcask.pipeline.teachers.transformers.torch.__version__", "2.13.1+cu128")
    monkeypatch.setattr("logitcask.pipeline.teachers.transformers.transformers.__version__", "5.24.1")


def test_an_upgrade_is_recorded_with_the_shards_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path)
    assert [each.shards for each in describe(cache).made_by] == [4]
    before = {k: v for k, v in folder_bytes(cache).items() if not k.startswith(("made_by/c/2", "commits/c/2"))}
    drop_shards(cache, 2)
    upgrade(monkeypatch)
    report = precompute(precompute_settings(tmp_path))
    assert (report.shards_written, report.shards_found) == (1, 3)
    assert verify(cache).problems == []
    info = describe(cache)
    made = [(each.shards, each.made_by.versions["torch"]) for each in info.made_by if each.made_by]
    assert made == [(3, str(torch.torch_version.__version__)), (1, "2.13.1+cu128")]
    first, second = (line for line in render(info).splitlines() if line.endswith("shards)"))
    assert first.startswith("made by     logitcask ")
    assert second.endswith(", torch 2.13.1+cu128, transformers 5.24.1 on cpu (1 shards)")
    after = folder_bytes(cache)
    assert {key: after[key] for key in before} == before, "nothing else differs"


@pytest.mark.parametrize("how", ["another folder", "a snapshot of the hub's cache", "."])
def test_the_same_teacher_from_another_place_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    cache = make_cache(tmp_path)
    wanted = folder_bytes(cache)
    drop_shards(cache, 0, 3)
    place = tmp_path / {"another folder": "other", ".": "here"}.get(how, "models--a--b/snapshots/0123")
    shutil.copytree(tmp_path / "teacher", place)
    if how == ".":
        monkeypatch.chdir(place)
    precompute(precompute_settings(tmp_path, teacher_model="." if how == "." else str(place)))
    assert folder_bytes(cache) == wanted, "the manifest too is the one that was there"
    assert teacher_id(str(place)) == {"another folder": "other", ".": "here"}.get(how, "a/b")
    assert teacher_id(".") == (place.name if how == "." else Path.cwd().name)


def test_the_tokenizers_files_do_not_depend_on_how_it_was_loaded(tmp_path: Path) -> None:
    """As with HF_HUB_OFFLINE, which leaves its mark in a tokenizer's settings."""
    folder = make_teacher(tmp_path / "teacher", chat=True)
    plain, marked = load_tokenizer(str(folder)), load_tokenizer(str(folder))
    marked.init_kwargs.update(is_local=True, local_files_only=True, name_or_path="elsewhere")
    assert tokenizer_files(plain) == tokenizer_files(marked)
    kept = json.loads(tokenizer_files(marked)["tokenizer_config.json"])
    assert kept["eos_token"] == "<|im_end|>"
    assert not kept.keys() & {"is_local", "local_files_only", "name_or_path"}


def test_tokenizer_files_of_another_version_resume_and_stay_as_they_were(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    wanted = folder_bytes(cache)
    drop_shards(cache, 1)
    settings = tmp_path / "teacher/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "new_option": 1}))
    precompute(precompute_settings(tmp_path))
    assert folder_bytes(cache) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_what_the_cache_was_made_with(tmp_path: Path, dtype: str) -> None:
    """Another machine would choose another dtype."""
    cache = make_cache(tmp_path, dtype=dtype)
    wanted = folder_bytes(cache)
    drop_shards(cache, 1)
    precompute(precompute_settings(tmp_path, dtype="auto", engine="auto"))
    assert folder_bytes(cache) == wanted
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    for complete in (True, False):
        with pytest.raises(CacheMismatchError, match=rf"teacher\.dtype: cache has '{dtype}', this run has '{other}'"):
            precompute(precompute_settings(tmp_path, dtype=other))
        if complete:
            drop_shards(cache, 1)


def test_a_cache_of_format_4_is_finished_as_format_4(tmp_path: Path) -> None:
    """Its manifest has the versions, its shards no record."""
    cache = make_cache(tmp_path)
    reader = CacheReader(cache)
    versions = {"torch": "2.9.0", "transformers": "5.1.0"}
    old = reader.manifest.model_copy(
        update={"format_version": 4, "teacher": reader.manifest.teacher.model_copy(update={"versions": versions})}
    )
    starts = reader.shard_starts[1:] - reader.shard_starts[:-1]
    create_cache(tmp_path / "old", old, starts, reader.tokenizer_files())
    report = precompute(precompute_settings(tmp_path, output=tmp_path / "old"))
    assert (report.shards_written, report.manifest) == (4, old)
    assert verify(tmp_path / "old").problems == []
    assert not (tmp_path / "old/made_by").exists()
    new, made = folder_bytes(cache), folder_bytes(tmp_path / "old")
    data = [key for key in made if "/c/" in key and not key.startswith(("commits", "seal"))]
    assert len(data) > 40
    assert {key: made[key] for key in data} == {key: new[key] for key in data}
    (makers,) = describe(tmp_path / "old").made_by
    assert makers.made_by
    assert (makers.shards, makers.made_by.versions) == (4, versions)
    (stored,) = describe(STORED).made_by
    assert stored.made_by
    assert "torch" in stored.made_by.versions


def test_nodes_of_a_cluster_may_differ_in_versions_but_not_in_weights(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    from logitcask.pipeline.precompute.precompute import teacher_spec

    facts = load_transformers(teacher_spec(precompute_settings(tmp_path)), "float32", "cpu").facts
    newer = facts.made_by.model_copy(update={"versions": {"torch": "3"}})
    assert _compared(facts) == _compared(type(facts)(facts.identity, newer, facts.logits_width, facts.max_length))
    other = facts.identity.model_copy(update={"weights": "0" * 64})
    assert _compared(facts) != _compared(type(facts)(other, facts.made_by, facts.logits_width, facts.max_length))


# ---- a complete cache


def test_a_complete_cache_is_left_alone_without_loading_the_teacher(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    wanted = folder_bytes(cache)
    (tmp_path / "teacher/model.safetensors").unlink()
    report = precompute(precompute_settings(tmp_path))
    assert (report.shards_written, report.shards_found) == (0, 4)
    report = precompute(precompute_settings(tmp_path, shards="1/2"))
    assert (report.shards_written, report.shards_found) == (0, 2)
    assert folder_bytes(cache) == wanted
    write_jsonl(tmp_path / "train.jsonl", RECORDS[1:])
    with pytest.raises(CacheMismatchError, match=r"data\.examples: cache has 24, this run has 23"):
        precompute(precompute_settings(tmp_path))


def test_a_complete_cache_of_another_teacher_is_refused_with_the_difference(tmp_path: Path) -> None:
    make_cache(tmp_path)
    make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights: cache has "):
        precompute(precompute_settings(tmp_path, teacher_model=str(tmp_path / "other")))
    shutil.copytree(tmp_path / "teacher", tmp_path / "same")
    report = precompute(precompute_settings(tmp_path, teacher_model=str(tmp_path / "same")))
    assert (report.shards_written, report.shards_found) == (0, 4)


# ---- the date

LLAMA = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y, %H:%M') %}{%- endif %}"
    "Today Date: {{ date_string }}\n"
)
CONSTANT = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{{ date_string }}\n"
CHATS: list[dict[str, object]] = [{"prompt": f"Count to {n}.", "response": f"One, and so on to {n}."} for n in range(9)]


class Clock:
    """The machine's date, for transformers and for us."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = datetime.datetime(2026, 11, 28, 23, 59)
        clock = self

        class Day(datetime.date):
            @classmethod
            def today(cls) -> Any:
                return cls(clock.now.year, clock.now.month, clock.now.day)

        class Moment(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return clock.now

        patch.setattr(datetime, "date", Day)
        patch.setattr("transformers.utils.chat_template_utils.datetime", Moment)


def dated_teacher(folder: Path, start: str) -> Path:
    teacher = make_teacher(folder / "teacher", chat=True)
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.chat_template = start + str(tokenizer.chat_template)
    tokenizer.save_pretrained(teacher)
    write_jsonl(folder / "train.jsonl", CHATS)
    return teacher


def first_text(cache: Path) -> str:
    reader = CacheReader(cache)
    return str(load_tokenizer(str(cache.parent / "teacher")).decode(reader.example(0).input_ids))


def test_a_template_that_writes_the_date_is_resumed_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    teacher = dated_teacher(tmp_path, LLAMA)
    data = {"train_data": str(tmp_path / "train.jsonl"), "shard_positions": 40}
    cache = make_cache(tmp_path, teacher, **data)
    assert CacheReader(cache).manifest.data.date == "2026-11-28"
    assert "the chat template writes the date: 2026-11-28" in render(describe(cache))
    assert "the chat template writes the date into the examples: 2026-11-28" in capsys.readouterr().err
    assert first_text(cache).startswith("Today Date: 28 Nov 2026, 00:00\n")
    wanted = folder_bytes(cache)
    clock.now = datetime.datetime(2027, 2, 3)
    drop_shards(cache, 0)
    settings = precompute_settings(tmp_path, **data)
    precompute(settings)
    assert folder_bytes(cache) == wanted
    for part in ("2/2", "1/2"):  # in other time zones
        precompute(settings.model_copy(update={"output": tmp_path / "parts", "shards": part}))
        clock.now += datetime.timedelta(days=1)
    assert CacheReader(tmp_path / "parts").manifest.data.date == "2027-02-03"
    precompute(settings.model_copy(update={"overwrite": True}))
    assert CacheReader(cache).manifest.data.date == "2027-02-05"
    assert first_text(cache).startswith("Today Date: 05 Feb 2027")


def test_parts_begun_at_once_on_two_days_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    teacher = dated_teacher(tmp_path, LLAMA)
    settings = precompute_settings(tmp_path, teacher_model=str(teacher), shard_positions=40)
    monkeypatch.setattr(
        "logitcask.pipeline.precompute.precompute.stored_manifest", lambda path, overwrite: None
    )  # neither run saw the other's
    precompute(settings)
    clock.now += datetime.timedelta(days=1)
    with pytest.raises(CacheMismatchError, match=r"data\.date: cache has '2026-11-28'.*run the same command again"):
        precompute(settings)


def test_a_template_without_the_date_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.1's reads ``date_string`` and has a constant in its place."""
    clock = Clock(monkeypatch)
    teacher = dated_teacher(tmp_path, CONSTANT)
    data = {"train_data": str(tmp_path / "train.jsonl")}
    first = folder_bytes(make_cache(tmp_path, teacher, output=tmp_path / "a", **data))
    clock.now = datetime.datetime(2027, 2, 3)
    assert folder_bytes(make_cache(tmp_path, teacher, output=tmp_path / "b", **data)) == first
    assert CacheReader(tmp_path / "a").manifest.data.date is None
    assert first_text(tmp_path / "a").startswith("26 Jul 2024\n")


def test_other_encoders_and_the_tokenizer_itself_keep_their_own_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a day, as in train --train-data and plan: today."""
    Clock(monkeypatch)
    tokenizer = load_tokenizer(str(dated_teacher(tmp_path, LLAMA)))
    pinned = Encoder(tokenizer, prompt_loss=False, day=datetime.date.fromisoformat("2020-01-31"))
    today = Encoder(tokenizer, prompt_loss=False)
    texts = [tokenizer.decode(each.examples(CHATS[0])[0].input_ids)[:23] for each in (pinned, today, pinned)]
    assert texts == ["Today Date: 31 Jan 2020", "Today Date: 28 Nov 2026", "Today Date: 31 Jan 2020"]
    assert (pinned.date, today.date) == ("2020-01-31", "2026-11-28")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert str(rendered).startswith("Today Date: 28 Nov 2026, 23:59\n")


def test_a_writer_without_a_record_leaves_it_empty(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    reader = CacheReader(cache)
    shard = reader.shard(0)
    from dataclasses import replace

    CacheWriter(cache, reader.manifest).write_shard(0, replace(shard, fidelity=reader.shard_fidelity(0)))
    assert CacheReader(cache).made_by(0) is None
    assert "not recorded (1 shards)" in render(describe(cache))
    assert verify(cache).problems == []


@pytest.mark.parametrize(
    "more",
    [{}, {"preset": "exact", "tail_draws": 0}, pytest.param({"ray": "local", "workers": 1}, marks=pytest.mark.nightly)],
    ids=str,
)
def test_a_cache_is_not_finished_by_a_teacher_with_another_config(tmp_path: Path, more: dict[str, Any]) -> None:
    """The weights are the same, and so is the identity in the manifest; its labels are not."""
    teacher = make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    first, rest = (precompute_settings(tmp_path, shards=part, **more) for part in ("1/2", "2/2"))
    precompute(first)
    before = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(json.dumps({**json.loads(before), "rms_norm_eps": 1.0}))
    with pytest.raises(LogitcaskError, match=r"its labels differ from the teacher's by .* other settings, such as"):
        precompute(rest)
    (teacher / "config.json").write_text(before)
    assert precompute(rest).shards_written == 2
    assert verify(str(rest.output)).problems == []
