"""The check of an engine before it labels anything: the run stops if its labels differ from transformers'."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader, is_complete
from logitcask.pipeline.precompute.precompute import precompute, teacher_spec
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.load import check_engine, load_transformers
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher
from tests.support.tiny import RECORDS, make_teacher, precompute_settings, write_jsonl

LABEL = LabelSettings(vocab_size=300, head_size=4, tail_draws=8, temperatures=[1.0, 2.0], seed=0, fidelity_positions=0)
RARE = 299  # a token in the last example only
ENGINE = "an engine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engine check")
    make_teacher(place / "teacher")
    write_jsonl(place / "train.jsonl", RECORDS)
    return place


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> PrecomputeSettings:
    return precompute_settings(folder, output=tmp_path / "cache")


def batch() -> list[TokenizedExample]:
    random = np.random.default_rng(0)
    ids = [random.integers(0, RARE, length) for length in (30, 20, 10, 5, 3)]
    ids[-1][0] = RARE
    masks = [np.arange(len(each)) < len(each) - 1 for each in ids]
    return [TokenizedExample(n, ids[n], masks[n], np.zeros(len(ids[n]) - 1, dtype=bool)) for n in range(len(ids))]


def loaded(settings: PrecomputeSettings, dtype: str = "float32", engine: str = ENGINE) -> TransformersTeacher:
    """Load a teacher that claims to be another engine."""
    teacher = load_transformers(teacher_spec(settings), dtype, "cpu")
    teacher.facts = replace(teacher.facts, identity=teacher.facts.identity.model_copy(update={"engine": engine}))
    return teacher


def altered(settings: PrecomputeSettings, name: str, row: int | slice, factor: float, to: Path) -> PrecomputeSettings:
    """Return settings of the same teacher, except for rows of one parameter."""
    shutil.copytree(settings.teacher_model, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name][row] *= factor
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return settings.model_copy(update={"teacher_model": str(to)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_with_the_same_labels_passes(settings: PrecomputeSettings, dtype: str) -> None:
    check_engine(loaded(settings, dtype), teacher_spec(settings), batch(), LABEL)


@pytest.mark.parametrize(("dtype", "factor", "limit"), [("float32", 1.01, "0.001"), ("bfloat16", 3.0, "0.5")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_an_engine_with_other_weights_is_refused(
    settings: PrecomputeSettings, tmp_path: Path, name: str, dtype: str, factor: float, limit: str
) -> None:
    other = altered(settings, name, slice(None), factor, tmp_path / "altered")
    with pytest.raises(LogitcaskError) as refused:
        check_engine(loaded(other, dtype), teacher_spec(settings), batch(), LABEL)
    before, _, after = str(refused.value).partition(" nats, ")
    start, _, difference = before.partition(" differs by ")
    assert start == f"{ENGINE} and transformers disagree: gold_logprobs"
    assert float(difference) > float(limit)
    assert after == (
        f"at most {limit} is expected in {dtype}: use --engine transformers; "
        "--skip-engine-check is for teachers too large to load twice"
    )


def test_one_wrong_example_is_enough(settings: PrecomputeSettings, tmp_path: Path) -> None:
    """If its labels are NaN, that is said."""
    for factor, reason in ((2.0, "disagree"), (np.nan, "is impossible: gold_logprobs must be at most 0, got nan")):
        other = altered(settings, "model.embed_tokens.weight", RARE, factor, tmp_path / str(factor))
        with pytest.raises(LogitcaskError, match=reason):
            check_engine(loaded(other), teacher_spec(settings), batch(), LABEL)


def test_stage_1_stops_before_any_shard(
    settings: PrecomputeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = altered(settings, "model.norm.weight", slice(None), 1.1, tmp_path / "altered")
    monkeypatch.setattr("logitcask.pipeline.precompute.local.load_engine", lambda spec: loaded(other, engine="vllm"))
    with pytest.raises(LogitcaskError, match="vllm and transformers disagree: gold_logprobs differs by"):
        precompute(settings)
    assert not is_complete(settings.output)
    assert not list(Path(settings.output).glob("commits/c/*"))
    precompute(settings.model_copy(update={"skip_engine_check": True}))
    assert CacheReader(settings.output).manifest.teacher.engine == "vllm"
