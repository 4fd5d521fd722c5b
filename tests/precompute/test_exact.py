"""Stage 1 with exact labels: what a cache of them holds, read back, resumed, cut into parts."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.exact.head import decode
from logitcask.cache.labels import ExactTargets, FloatArray
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.cache.verify import verify
from logitcask.library.create import create
from logitcask.pipeline.models.head import last_hidden_states
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.shapes import shape_of_size
from logitcask.pipeline.plan.plan import make_plan
from logitcask.pipeline.precompute.local import LocalExecutor
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.teachers import labelling
from logitcask.pipeline.teachers.exact import fit
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.support.tiny import folder_bytes, make_cache, precompute_settings

EXACT: dict[str, Any] = {
    "preset": "exact",
    "head_size": 4,
    "tail_draws": 0,
    "hidden_bits": 8,
    "fidelity_positions": 40,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("exact"), **EXACT)


def test_the_logits_of_a_label_are_the_teachers(cache: Path) -> None:
    reader, model = CacheReader(cache), load_causal_lm(str(cache.parent / "teacher"), dtype=torch.float32)
    head, example = reader.teacher_head(), reader.example(3)
    assert isinstance(example.targets, ExactTargets)
    code, hidden = reader.manifest.label.exact, decode(example.targets, head)
    assert code is not None
    assert code.trellis == 4
    with torch.inference_mode():
        true = last_hidden_states(model, torch.from_numpy(example.input_ids)[None])[0].numpy()[example.target_mask]
        logits = model(torch.from_numpy(example.input_ids)[None]).logits[0].numpy()[example.target_mask]
    assert np.abs(hidden - true).max() < 0.02 * np.abs(true).max()
    assert np.abs(head.logits(hidden) - logits).max() < 0.03 * np.abs(logits).max()


def test_a_killed_run_resumes_to_the_same_bytes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalExecutor, "fitted_head", None)  # the basis of the cache is kept
    whole = folder_bytes(cache)
    again = tmp_path / "again" / "cache"
    shutil.copytree(cache.parent, again.parent)
    for name in ("commits/c/1", "hidden_codes/c/1", "commits/c/3"):
        shutil.rmtree(again / name)
    make_cache(again.parent, again.parent / "teacher", **EXACT)
    assert "\nbasis " not in capsys.readouterr().err
    assert folder_bytes(again) == whole


def test_a_cache_begun_without_a_trellis_and_the_bias_of_tails_is_finished_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "TRELLIS_FROM", 9)  # as before there was one
    monkeypatch.setattr(labelling, "tail_bias", lambda *_: None)  # nor was that measured
    cache = make_cache(tmp_path, **EXACT)
    whole, code = folder_bytes(cache), CacheReader(cache).manifest.label.exact
    assert code is not None
    assert (code.trellis, code.tail_bias) == (None, None)
    monkeypatch.undo()
    for name in ("commits/c/1", "hidden_codes/c/1"):
        shutil.rmtree(cache / name)
    make_cache(tmp_path, tmp_path / "teacher", **EXACT)
    assert folder_bytes(cache) == whole
    (cache / "head/basis/c/0/0").unlink()
    shutil.rmtree(cache / "commits/c/1")
    with pytest.raises(LogitcaskError, match="is missing or damaged, and this run would write another one"):
        make_cache(tmp_path, tmp_path / "teacher", **EXACT)


def test_parts_agree(cache: Path, tmp_path: Path) -> None:
    for part in ("2/2", "1/2"):
        out = make_cache(tmp_path, cache.parent / "teacher", shards=part, **EXACT)
    assert folder_bytes(out) == folder_bytes(cache)


def test_of_a_large_batch_about_as_many_positions_are_read_as_are_wanted(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(
        str(cache.parent / "teacher"), revision=None, dtype="float32", device="cpu", trust_remote_code=False
    )
    reader, read = CacheReader(cache), list[int]()
    stored = map(reader.example, range(len(reader)))
    batch = [
        TokenizedExample(i, each.input_ids, each.target_mask, np.zeros(len(each.targets), bool))
        for i, each in enumerate(stored)
    ]

    def states(part: Sequence[TokenizedExample]) -> FloatArray:
        found = type(teacher).hidden_states(teacher, part)
        read.append(len(found))
        return found

    monkeypatch.setattr(teacher, "hidden_states", states)
    monkeypatch.setattr(labelling, "calibration_positions", lambda width: 40)
    monkeypatch.setattr(labelling, "BIASED", 20)
    label = reader.manifest.label.model_copy(update={"exact": None})
    others = list[FloatArray]()
    monkeypatch.setattr(labelling, "tail_bias", lambda head, hidden, code, label: others.append(hidden))
    labelling.fitted_head(teacher, [batch, batch], label, 8)
    assert len(others[0]) == sum(read) - 40, "what the basis was not fitted to"
    assert 60 <= sum(read) <= 120 < reader.manifest.data.positions


def test_a_copied_part_keeps_the_head(cache: Path, tmp_path: Path) -> None:
    copy_cache(str(cache), str(tmp_path / "part.zip"), (1, 3))
    assert verify(tmp_path / "part.zip").problems == []
    part, whole = CacheReader(tmp_path / "part.zip"), CacheReader(cache)
    assert part.teacher_head().identity == whole.teacher_head().identity
    assert np.array_equal(part.shard(0).targets.codes, whole.shard(1).targets.codes)  # type: ignore[attr-defined]


def test_a_wait_of_minutes_is_announced(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cache(tmp_path, cache.parent / "teacher", **EXACT)
    assert "\nbasis     fitting the code of hidden states to this teacher: " in capsys.readouterr().err


def test_other_bits_are_another_cache(cache: Path) -> None:
    with pytest.raises(LogitcaskError, match=r"label.exact.bits: cache has 8, this run has 4"):
        make_cache(cache.parent, cache.parent / "teacher", **{**EXACT, "hidden_bits": 4})


def test_a_cache_of_sparse_labels_has_no_head_and_is_not_finished_as_one_of_exact_labels(tmp_path: Path) -> None:
    same = {"head_size": EXACT["head_size"], "tail_draws": 0}
    with pytest.raises(LogitcaskError, match="--preset exact"):
        CacheReader(make_cache(tmp_path, **same)).teacher_head()
    with pytest.raises(LogitcaskError, match=r"label.exact.bits: cache has None"):
        make_cache(tmp_path, tmp_path / "teacher", preset="exact", **same)


def test_what_info_says_of_it(cache: Path) -> None:
    info = describe(cache)
    assert "head 4, hidden state of width 32 in 8 bits" in render(info)
    assert info.divergence is not None
    assert all(0.0 < divergence < 1e-3 for divergence in info.divergence)
    assert all(at.label.noise < 0.03 for at in info.fidelity)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"preset": "standard", "hidden_bits": 5}, "--hidden-bits requires --preset exact"),
        ({"tail_draws": 3}, "a head and no draws"),
        ({"head_size": 0}, "at least 1"),
        ({"engine": "vllm-topk", "temperatures": (1.0,), "fidelity_positions": 0}, "needs the teacher's hidden states"),
    ],
)
def test_what_exact_labels_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        precompute_settings(tmp_path, **{**EXACT, **changes})


def test_a_writer_of_other_labels_refuses_them(cache: Path, tmp_path: Path) -> None:
    label = CacheReader(cache).manifest.label.model_copy(update={"fidelity_positions": 0})
    with pytest.raises(LogitcaskError, match="precompute-logits --preset exact"):
        create(tmp_path / "out", label=label, tokenizer=str(cache.parent / "teacher"), teacher="t")


def test_a_plan_prints_their_size_and_where_sparse_ones_are_better() -> None:
    asked: list[dict[str, Any]] = [
        {"teacher_model": size, "tokens": 10**6, "preset": "exact"} for size in ("100M", "7B")
    ]
    plans = [make_plan(PlanSettings.model_validate(each)) for each in asked]
    narrow, wide = (plan.cache_bytes_by_part["hidden_codes"] / plan.positions for plan in plans)
    assert wide / narrow == pytest.approx(shape_of_size("7B").hidden / shape_of_size("100M").hidden, rel=0.01)
    assert not any("sparse labels" in line for line in plans[0].assumed)
    assert any("sparse labels of as many bytes are closer" in line for line in plans[1].assumed)
