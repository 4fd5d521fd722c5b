"""Runs on exact labels: resumed and extended to the last bit, held-out labels of their own, and what evaluate says."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from tests.support.runs import STUDENT, history, losses, metrics, train, weights, write_config
from tests.support.tiny import WORDS, make_cache, write_jsonl
from tests.train.test_train import dense

EXACT: dict[str, Any] = {"preset": "exact", "tail_draws": 0, "hidden_bits": 8}
AGAIN = {"resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, one of the same examples in coarser codes, and one of other examples."""
    folder = tmp_path_factory.mktemp("runs")
    make_cache(folder, **EXACT)
    make_cache(folder, folder / "teacher", output=folder / "coarse", **{**EXACT, "hidden_bits": 4})
    unseen: list[dict[str, object]] = [{"text": f"Of {word} there are never enough."} for word in WORDS]
    data = str(write_jsonl(folder / "unseen.jsonl", unseen))
    make_cache(folder, folder / "teacher", output=folder / "unseen", train_data=data, **EXACT)
    return folder


@pytest.fixture(scope="module")
def options(place: Path) -> dict[str, Any]:
    """Two epochs and a half, all that an exact label can do at once."""
    return {
        "max_steps": 8, "save_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "temperature": "3:1.2",
        "divergence": "jsd", "alpha": 0.3, "select": "teacher-entropy:0.5",
        "student_config": write_config(place / "student.json", STUDENT),
        "eval_cache": str(place / "unseen"), "eval_fraction": 0.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def straight(place: Path, options: dict[str, Any]) -> Path:
    return train(place / "cache", place / "straight", **options)


def killed_at(step: int, straight: Path, folder: Path) -> Path:
    """Return a copy of a run without what it wrote after a checkpoint."""
    shutil.copytree(straight, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "final")
    (folder / "metrics.json").unlink()
    return folder


def test_a_killed_run_resumes_to_the_same_bits(
    place: Path, options: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    run = train(place / "cache", killed_at(3, straight, tmp_path / "run"), **options, **AGAIN)
    assert losses(run) == losses(straight)
    assert metrics(run) == metrics(straight)
    torch.testing.assert_close(weights(run / "final"), weights(straight / "final"), rtol=0.0, atol=0.0)


def test_it_does_not_resume_on_other_codes_of_the_same_examples(
    place: Path, options: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(LogitcaskError, match="another run: source"):
        train(place / "coarse", killed_at(3, straight, tmp_path / "run"), **options, **AGAIN)


def test_extended_at_a_constant_rate_it_is_a_run_of_that_length(
    place: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    constant = {**options, "max_steps": 4, "temperature": 2.5, "training_args": {"lr_scheduler_type": "constant"}}
    run = train(place / "cache", tmp_path / "run", **{**constant, "max_steps": 2})
    train(place / "cache", run, **constant, **AGAIN, extend=True)
    whole = train(place / "cache", tmp_path / "whole", **constant)
    assert losses(run) == losses(whole)
    torch.testing.assert_close(weights(run / "final"), weights(whole / "final"), rtol=0.0, atol=0.0)


def test_schedules_of_an_extended_run_are_those_of_its_new_length(
    place: Path, options: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    run = train(place / "cache", tmp_path / "run", **{**options, "max_steps": 10}, **AGAIN, extend=True)
    steps = [(step, 8) for step in range(8)] + [(step, 10) for step in range(8, 10)]
    assert [line["temperature"] for line in history(run)] == pytest.approx([3 - 1.8 * s / (n - 1) for s, n in steps])


def test_held_out_losses_are_of_the_cache_that_is_held_out(place: Path, straight: Path) -> None:
    """At the temperature and by the divergence of training, from the teacher's own distributions."""
    t = 1.2
    (p, _), (q, gold) = (
        dense(model, place / "unseen", list(range(len(WORDS))), t) for model in (place / "teacher", straight / "final")
    )
    middle = torch.logaddexp(p, q) - math.log(2)
    jsd = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1).mean()
    after = metrics(straight)["after"]
    assert after["eval_soft_loss"] == pytest.approx(t**2 * float(jsd), rel=1e-2)
    at_1 = (t * q).log_softmax(1)
    assert after["eval_hard_loss"] == pytest.approx(-float(at_1.gather(1, gold[:, None]).mean()), rel=1e-4)


def test_evaluate_gives_the_divergence_at_any_temperature(place: Path, straight: Path, tmp_path: Path) -> None:
    asked = {"model": str(straight / "final"), "cache": str(place / "unseen"), "device": "cpu"}
    file = tmp_path / "figures.json"
    evaluate(EvaluateSettings.model_validate({**asked, "temperatures": "0.8,2,5", "output": file}))
    found = json.loads(file.read_text())["on_cache"]
    assert found["kl_estimate"] == "exact labels"
    for each in found["kl"]:
        (p, _), (q, _) = (
            dense(model, place / "unseen", list(range(len(WORDS))), each["temperature"])
            for model in (place / "teacher", straight / "final")
        )
        assert each["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-2), each["temperature"]
    assert [each["temperature"] for each in found["kl"]] == [0.8, 2.0, 5.0]
