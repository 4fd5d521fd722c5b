"""Heads leave a cache and come back label for label; ``datasets`` reads them, a student trains on them."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import logitcask as lc
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.labels_from.export import export_labels
from logitcask.pipeline.labels_from.import_labels import import_labels
from logitcask.pipeline.settings.cache import ImportSettings
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from tests.labels_from.test_import import TEXTS, K, bring, labels_of, manifest_of, tokenizer
from tests.support.foreign import top_k_row
from tests.support.runs import train
from tests.support.tiny import RECORDS, make_cache, make_teacher, write_jsonl

__all__ = ["bring", "tokenizer"]  # fixtures
NAMES = {"parquet": "labels.parquet", "topk-jsonl": "labels.jsonl"}


@pytest.mark.parametrize("form", ["parquet", "topk-jsonl"])
@pytest.mark.parametrize("rest", [True, False], ids=["rest", "no rest"])
def test_what_is_exported_is_imported_label_for_label(form: str, rest: bool, bring: Any, tmp_path: Path) -> None:
    rows = [top_k_row(text, K, labels=[-100] * 3 + text.ids[3:].tolist()) for text in TEXTS]
    for row in rows:
        values = np.array(row["logprobs"])
        row["logprobs"] = (values if rest else values - np.log(np.exp(values).sum(1, keepdims=True))).tolist()
    bring(rows, output=tmp_path / "first")
    output = tmp_path / NAMES[form]
    assert export_labels(str(tmp_path / "first"), output, form) == len(TEXTS)
    bring(output)
    first, again = CacheReader(tmp_path / "first"), labels_of(tmp_path / "cache")
    for index, (ids, mask, targets) in enumerate(again):
        want = first.example(index)
        np.testing.assert_array_equal(ids, want.input_ids)
        np.testing.assert_array_equal(mask, want.target_mask)
        for name, values in vars(targets).items():
            np.testing.assert_array_equal(values, getattr(want.targets, name), err_msg=name)
    assert manifest_of(tmp_path / "cache").label == first.manifest.label


def test_the_heads_of_stage_1_come_back(tmp_path: Path) -> None:
    """At T=1, without the draws; of so few positions that nobody asks whether a random teacher wrote the text."""
    data = write_jsonl(tmp_path / "two.jsonl", RECORDS[:2])
    cache = make_cache(tmp_path, make_teacher(tmp_path / "teacher"), train_data=str(data))
    export_labels(str(cache), tmp_path / "heads.parquet", "parquet")
    given = {"source": str(tmp_path / "heads.parquet"), "format": "topk", "tokenizer": str(tmp_path / "teacher")}
    import_labels(ImportSettings.model_validate({**given, "output": tmp_path / "again"}))
    first = CacheReader(cache)
    for index, (ids, mask, targets) in enumerate(labels_of(tmp_path / "again")):
        want = first.example(index)
        np.testing.assert_array_equal(ids, want.input_ids)
        np.testing.assert_array_equal(mask, want.target_mask)
        for name in ("head_ids", "head_logprobs", "gold_logprobs"):
            np.testing.assert_array_equal(getattr(targets, name), getattr(want.targets, name), err_msg=name)
        np.testing.assert_array_equal(targets.log_tail_mass[:, 0], want.targets.log_tail_mass[:, 0])


def test_what_is_exported_is_training_data_of_the_same_targets(tmp_path: Path) -> None:
    """A cache that is labelled anew, by another teacher say."""
    cache = make_cache(tmp_path)
    export_labels(str(cache), tmp_path / "heads.jsonl", "topk-jsonl")
    make_cache(tmp_path, tmp_path / "teacher", train_data=str(tmp_path / "heads.jsonl"), output=tmp_path / "anew")
    first, again = (
        {tuple(ids.tolist()): (mask.tolist(), targets.head_ids.tolist()) for ids, mask, targets in labels_of(folder)}
        for folder in (cache, tmp_path / "anew")
    )
    assert first == again


def test_datasets_reads_what_is_exported(bring: Any, tmp_path: Path) -> None:
    bring([top_k_row(text, K) for text in TEXTS])
    want = CacheReader(tmp_path / "cache").example(3)
    for form, name in NAMES.items():
        export_labels(str(tmp_path / "cache"), tmp_path / name, form)
        kind = "parquet" if form == "parquet" else "json"
        rows = datasets.load_dataset(
            kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "c")
        )
        assert len(rows) == len(TEXTS)
        np.testing.assert_array_equal(rows[3]["input_ids"], want.input_ids)
        np.testing.assert_array_equal(rows[3]["token_ids"], want.targets.head_ids)
        np.testing.assert_array_equal(np.float32(rows[3]["logprobs"]), want.targets.head_logprobs)
    with pytest.raises(LogitcaskError, match="already exists: choose another --output or pass --overwrite"):
        export_labels(str(tmp_path / "cache"), tmp_path / name, form)
    with pytest.raises(LogitcaskError, match="is a folder: --output must name a file"):
        export_labels(str(tmp_path / "cache"), tmp_path, form, overwrite=True)
    with pytest.raises(LogitcaskError, match="--format: must be parquet or topk-jsonl, got 'csv'"):
        export_labels(str(tmp_path / "cache"), tmp_path / "x", "csv")
    assert not list(tmp_path.glob(".*"))


def test_a_student_trains_on_imported_labels(bring: Any, tmp_path: Path) -> None:
    """With the rest by bucket; without, by renormalize alone, and the others are refused in one line."""
    rows = [top_k_row(text, K) for text in TEXTS]
    bring(rows, output=tmp_path / "known")
    bare = [{**row, "logprobs": (np.array(row["logprobs"]) + 3).tolist()} for row in rows]
    bring(bare, output=tmp_path / "bare")
    train(tmp_path / "known", tmp_path / "run-known", max_steps=2)
    train(tmp_path / "bare", tmp_path / "run-bare", max_steps=2)
    with pytest.raises(LogitcaskError, match="--tail bucket needs the mass outside the head, which the source of"):
        train(tmp_path / "bare", tmp_path / "run", tail="bucket")
    for name in ("known", "bare"):
        student = str(tmp_path / f"run-{name}/final")
        settings = EvaluateSettings.model_validate({"model": student, "cache": str(tmp_path / name), "device": "cpu"})
        with np.errstate(all="raise", under="ignore"):
            figures = evaluate(settings).on_cache
        assert figures is not None
        assert figures.teacher_perplexity is None  # of next tokens outside the head nothing is known
    label = manifest_of(tmp_path / "bare").label
    for tail in ("bucket", "sampled"):
        assert label.tail_fault(tail) is not None
        with pytest.raises(LogitcaskError, match="use tail='renormalize'"):
            lc.open(tmp_path / "bare").collator(tail=tail)
    assert label.tail_fault("renormalize") is None
    assert lc.open(tmp_path / "bare").collator().tail == "renormalize"
    shown = render(describe(tmp_path / "bare"))
    assert "not known: the mass outside the head, next tokens outside the head" in shown
    assert "perplexity" not in shown
    assert "not known" in render(describe(tmp_path / "known"))


def test_caches_without_unknowns_have_the_manifest_they_had() -> None:
    label = LabelSettings(vocab_size=9, head_size=1, tail_draws=0, temperatures=[1.0], seed=0)
    assert "unknown" not in label.model_dump()
