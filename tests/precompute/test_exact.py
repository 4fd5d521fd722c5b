"""Stage 1 with exact labels: what a cache of them holds, read back, resumed, cut into parts."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.exact.head import decode
from logitcask.cache.labels import ExactTargets
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.pipeline.models.head import last_hidden_states
from logitcask.pipeline.models.load import load_causal_lm
from tests.support.tiny import folder_bytes, make_cache

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
    hidden = decode(example.targets, head)
    with torch.inference_mode():
        true = last_hidden_states(model, torch.from_numpy(example.input_ids)[None])[0].numpy()[example.target_mask]
        logits = model(torch.from_numpy(example.input_ids)[None]).logits[0].numpy()[example.target_mask]
    assert np.abs(hidden - true).max() < 0.02 * np.abs(true).max()
    assert np.abs(head.logits(hidden) - logits).max() < 0.03 * np.abs(logits).max()


def test_a_killed_run_resumes_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    whole = folder_bytes(cache)
    again = tmp_path / "again" / "cache"
    shutil.copytree(cache.parent, again.parent)
    for name in ("commits/c/1", "hidden_codes/c/1", "commits/c/3"):
        shutil.rmtree(again / name)
    make_cache(again.parent, again.parent / "teacher", **EXACT)
    assert folder_bytes(again) == whole


def test_parts_agree(cache: Path, tmp_path: Path) -> None:
    for part in ("2/2", "1/2"):
        out = make_cache(tmp_path, cache.parent / "teacher", shards=part, **EXACT)
    assert folder_bytes(out) == folder_bytes(cache)


def test_a_copied_part_keeps_the_head(cache: Path, tmp_path: Path) -> None:
    copy_cache(str(cache), str(tmp_path / "part.zip"), (1, 3))
    assert verify(tmp_path / "part.zip").problems == []
    part, whole = CacheReader(tmp_path / "part.zip"), CacheReader(cache)
    assert part.teacher_head().identity == whole.teacher_head().identity
    assert np.array_equal(part.shard(0).targets.codes, whole.shard(1).targets.codes)  # type: ignore[attr-defined]


def test_other_bits_are_another_cache(cache: Path) -> None:
    with pytest.raises(LogitcaskError, match=r"label.exact.bits: cache has 8, this run has 4"):
        make_cache(cache.parent, cache.parent / "teacher", **{**EXACT, "hidden_bits": 4})


def test_a_cache_of_sparse_labels_has_no_head(tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match="--preset exact"):
        CacheReader(make_cache(tmp_path)).teacher_head()
