"""The folder of a run where a model is meant, and a student evaluated on the cache it was trained on."""

import shutil
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.models.generate import generate_text
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.text.tokenizer import load_tokenizer
from tests.support.runs import train
from tests.support.tiny import make_cache, make_teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, one of another teacher, and a run on the first."""
    folder = tmp_path_factory.mktemp("place")
    train(make_cache(folder), folder / "run", max_steps=10, save_steps=2, save_total_limit=9)
    make_cache(folder, make_teacher(folder / "other", seed=1), output=folder / "other cache")
    return folder


def test_the_student_is_named_where_the_run_is_given(place: Path, tmp_path: Path) -> None:
    rule = f"run: is the folder of a run, not a model: give {place / 'run' / 'final'}$"
    with pytest.raises(LogitcaskError, match=rule):
        train(place / "cache", tmp_path / "new", student_model=str(place / "run"))
    with pytest.raises(LogitcaskError, match=rule):
        evaluate(
            EvaluateSettings.model_validate(
                {"model": str(place / "run"), "cache": str(place / "cache"), "device": "cpu"}
            )
        )


def test_generate_takes_the_folder_of_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(model: str) -> str:
        folder = str(place / model)
        return "".join(generate_text(folder, "How", max_new_tokens=8, temperature=0.0, device="cpu", seed=0))

    assert answer("run") == answer("run/final")
    assert capsys.readouterr().err == f"model     {place / 'run' / 'final'}\n"


def test_of_an_unfinished_run_it_is_the_latest_checkpoint(place: Path, tmp_path: Path) -> None:
    """By number: checkpoint-10 is later than checkpoint-8, and other names do not count."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(run / "final")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-old")
    with pytest.raises(LogitcaskError, match=r"give .*/run/checkpoint-10$"):
        load_tokenizer(str(run))
    load_tokenizer(str(run / "checkpoint-10"))


def test_evaluation_on_the_training_cache_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also on a copy of it, not on the same text with the labels of another teacher."""
    shutil.copytree(place / "cache", place / "copy")
    for name, trained_on in (("cache", True), ("copy", True), ("other cache", False)):
        capsys.readouterr()
        evaluate(
            EvaluateSettings.model_validate(
                {"model": str(place / "run/final"), "cache": str(place / name), "device": "cpu"}
            )
        )
        assert ("was trained on it: only other examples show" in capsys.readouterr().err) == trained_on
