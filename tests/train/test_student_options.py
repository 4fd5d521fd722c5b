"""How a student is loaded, held, trained in part, and saved."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.load import load_causal_lm, stored_dtype
from logitcask.pipeline.models.students.student import freeze
from tests.support.runs import losses, train, train_settings, weights
from tests.support.tiny import make_cache, make_teacher

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"), teacher)


@pytest.fixture(scope="module")
def half(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher in bfloat16, with other weights."""
    folder = shutil.copytree(teacher, tmp_path_factory.mktemp("half") / "student")
    model = AutoModelForCausalLM.from_pretrained(make_teacher(folder, seed=3))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in weights(folder).values()}


def test_frozen_parameters_do_not_move(cache: Path, teacher: Path, tmp_path: Path) -> None:
    options = {"student_model": str(teacher), "freeze": r"embed|layers\.0\.", "learning_rate": 1e-2, "save_steps": 2}
    run = train(cache, tmp_path / "run", **options)
    before, after = weights(teacher), weights(run / "final")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "embed" not in name and "layers.0." not in name}
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-3")
    train(cache, run, **options, resume_from_checkpoint="latest")
    torch.testing.assert_close(weights(run / "final"), after, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("pattern", "rule"), [("nothing", "is found in none of the 21 names"), ("", "in every one")])
def test_a_pattern_that_freezes_nothing_or_all(teacher: Path, pattern: str, rule: str) -> None:
    with pytest.raises(LogitcaskError, match=rule):
        freeze(load_causal_lm(str(teacher), dtype=torch.float32), pattern)


def test_bfloat16_in_bfloat16_out(cache: Path, half: Path, tmp_path: Path) -> None:
    """Trained in float32, as its checkpoints are."""
    assert stored_dtype(str(half)) is torch.bfloat16
    run = train(cache, tmp_path / "run", student_model=str(half), learning_rate=1e-2)
    assert dtypes(run / "final") == {torch.bfloat16}
    assert dtypes(run / "checkpoint-3") == {torch.float32}
    assert json.loads((run / "final/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((run / "final/settings.json").read_text())["save_dtype"] == "bfloat16"
    wide = train(cache, tmp_path / "wide", student_model=str(half), learning_rate=1e-2, save_dtype="float32")
    assert dtypes(wide / "final") == {torch.float32}
    for name, tensor in weights(wide / "final").items():
        assert torch.equal(tensor.bfloat16(), weights(run / "final")[name]), name


@pytest.mark.parametrize("start", ["model", "config", "layers"])
def test_trained_in_bfloat16_and_resumed(cache: Path, half: Path, teacher: Path, tmp_path: Path, start: str) -> None:
    options: dict[str, Any] = {"student_dtype": "bfloat16", "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    if start == "model":
        options["student_model"] = str(half)
    elif start == "layers":
        options |= {"init_from_teacher_layers": "1", "teacher_model": str(teacher)}
    run = train(cache, tmp_path / "run", **options)
    assert dtypes(run / "checkpoint-2") == {torch.bfloat16}
    assert dtypes(run / "final") == {torch.float32 if start == "layers" else torch.bfloat16}  # as the teacher is
    again = tmp_path / "again"
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(run.with_suffix(".json"), again.with_suffix(".json")) if start == "config" else None
    if start == "config":
        options["student_config"] = run.with_suffix(".json")
    train(cache, again, **options, resume_from_checkpoint="latest")
    assert losses(again) == losses(run)
    torch.testing.assert_close(weights(again / "final"), weights(run / "final"), rtol=0.0, atol=0.0)


def test_attention_is_chosen(cache: Path, teacher: Path, tmp_path: Path) -> None:
    runs = [train(cache, tmp_path / name, attn_implementation=name) for name in ("eager", "sdpa")]
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-5)
    with pytest.raises(LogitcaskError, match=r"--attn-implementation nothing: not for LlamaForCausalLM: .*use eager"):
        train(cache, tmp_path / "run", attn_implementation="nothing")


def test_a_model_with_code_of_its_own(cache: Path, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "own")
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "auto_map": maps, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LogitcaskError, match=r"contains custom code .*: if you trust it, give --trust-remote-code$"):
        train(cache, tmp_path / "run", student_model=str(folder))
    run = train(cache, tmp_path / "run", student_model=str(folder), trust_remote_code=True)
    assert (run / "final/own.py").is_file()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"init_from_teacher_layers": "auto:0", "teacher_model": "m"}, "layer numbers such as 0,9,19, or auto:20"),
        ({"freeze": "("}, "must be a regular expression: missing"),
        ({"student_revision": "v1"}, "--student-revision and --trust-remote-code apply to a --student-model"),
        ({"load_in_4bit": True}, "--load-in-4bit needs --lora-rank"),
        ({"student_model": "m", "lora_rank": 4, "save_dtype": "bfloat16"}, "--save-dtype of an adapter needs --merge"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        train_settings("c", tmp_path / "run", **changes)


def test_four_bits_need_their_package(
    cache: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcask.pipeline.models.adapters.find_spec", lambda name: None)
    with pytest.raises(LogitcaskError, match="--load-in-4bit needs bitsandbytes: pip install bitsandbytes"):
        train(cache, tmp_path / "run", student_model=str(teacher), lora_rank=2, load_in_4bit=True)


def test_chosen_layers_are_kept_with_the_run(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, and made again as its card says, a run has the layers that it began with."""
    teacher = make_teacher(tmp_path / "teacher", layers=5)
    options: dict[str, Any] = {"teacher_model": str(teacher), "max_steps": 4, "save_steps": 2}
    run = train(cache, tmp_path / "run", init_from_teacher_layers="auto:3", **options)
    (shown,) = re.findall(r"layers    3 of 5: ([0-4],[0-4],[0-4]): loss", capsys.readouterr().err)
    settings = json.loads((run / "final/settings.json").read_text())
    assert settings["init_from_teacher_layers"] == shown
    assert f"--init-from-teacher-layers {shown}" in (run / "final/README.md").read_text()
    again = train(cache, tmp_path / "again", init_from_teacher_layers=shown.replace(",", ", "), **options)
    resumed = tmp_path / "resumed"
    shutil.copytree(run / "checkpoint-2", resumed / "checkpoint-2")
    monkeypatch.setattr("logitcask.pipeline.train.student.choose_layers", None)  # not called
    train(cache, resumed, init_from_teacher_layers="auto:3", resume_from_checkpoint="latest", **options)
    for other in (again, resumed):
        torch.testing.assert_close(weights(other / "final"), weights(run / "final"), rtol=0.0, atol=0.0)
    with pytest.raises(LogitcaskError, match=r"init_from_teacher_layers: checkpoint has .*, this run has 'auto:2'"):
        train(cache, resumed, init_from_teacher_layers="auto:2", resume_from_checkpoint="latest", **options)
