"""A run extended by more steps: what its steps learn at, that it resumes, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from tests.support.runs import history, losses, metrics, train, train_settings, weights

AGAIN = {"resume_from_checkpoint": "latest"}
RATE = 1e-3


def cosine(step: int, steps: int) -> float:
    return RATE * 0.5 * (1 + math.cos(math.pi * step / steps))


def begun(straight: Path, folder: Path, *lost: str) -> Path:
    """Return a copy of a run of six steps without some of its folders."""
    shutil.copytree(straight, folder)
    for name in lost:
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture(scope="module")
def six(cache: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cache, tmp_path_factory.mktemp("six") / "run", **options, learning_rate=RATE, alpha="0.9:0.1")


@pytest.mark.parametrize("at", [4, 6])
def test_its_schedules_are_those_of_the_new_length_from_where_it_was(
    cache: Path, options: dict[str, Any], six: Path, tmp_path: Path, at: int
) -> None:
    """Interrupted after step 4, or finished; and then interrupted and resumed as any run."""
    lost = () if at == 6 else ("checkpoint-6", "final")
    run = begun(six, tmp_path / "run", *lost)
    longer = {**options, "max_steps": 10, "learning_rate": RATE, "alpha": "0.9:0.1"}
    train(cache, run, **longer, **AGAIN, extend=True)
    steps = [(step, 6) for step in range(at)] + [(step, 10) for step in range(at, 10)]
    lines = history(run)
    assert [line["learning_rate"] for line in lines] == pytest.approx([cosine(*step) for step in steps])
    assert [line["alpha"] for line in lines] == pytest.approx([0.9 - 0.8 * s / (n - 1) for s, n in steps])
    assert losses(run)[:at] == losses(six)[:at]
    assert metrics(run)["before"] == metrics(six)["before"]
    stored = json.loads((run / "final/settings.json").read_text())
    assert (stored["max_steps"], stored["extended_at"]) == (10, [at])
    again = begun(run, tmp_path / "again", "checkpoint-10", "final")
    train(cache, again, **longer, **AGAIN, extend=at == 4)  # which then has nothing to do
    assert losses(again) == losses(run)
    assert json.loads((again / "final/settings.json").read_text())["extended_at"] == [at]
    torch.testing.assert_close(weights(again / "final"), weights(run / "final"), rtol=0.0, atol=0.0)


def test_a_finished_run_moves_at_once(cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    """Its cosine had ended at a rate of nearly 0, which its optimizer still holds."""
    run = begun(straight, tmp_path / "run")
    train(cache, run, **{**options, "max_steps": 7}, **AGAIN, extend=True)
    before, after = (weights(run / name)["model.norm.weight"] for name in ("checkpoint-6", "final"))
    assert (after - before).abs().max() > 0.4 * 5e-4 * cosine(6, 7) / RATE


def test_at_a_constant_rate_it_is_a_run_of_that_length(cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """With --epochs, whose first one ends within the second's first step of accumulation."""
    constant = {**options, "max_steps": None, "training_args": {"lr_scheduler_type": "constant"}}
    run = train(cache, tmp_path / "run", **constant, epochs=0.5)
    train(cache, run, **constant, epochs=1.5, **AGAIN, extend=True)
    whole = train(cache, tmp_path / "whole", **constant, epochs=1.5)
    assert losses(run) == losses(whole)
    torch.testing.assert_close(weights(run / "final"), weights(whole / "final"), rtol=0.0, atol=0.0)
    assert metrics(run)["after"]["eval_total_loss"] == metrics(whole)["after"]["eval_total_loss"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"max_steps": 8},
            "max_steps: checkpoint has 6, this run has 8; use .*, or train it for more steps with --ext",
        ),
        ({"max_steps": 8, "learning_rate": 1.0, "extend": True}, "learning_rate: .*--extend allows other --max-steps"),
        ({"max_steps": 8, "seed": 1, "extend": True}, "another run: first_epoch: .*seed: checkpoint has 0, this run"),
        ({"max_steps": 5, "extend": True}, "is of a run of 6 steps, and this one has 5: give more --max-steps"),
        ({"epochs": 3.0, "extend": True}, "is of a run of 6 steps, and this one has 6: give more --max-steps"),
    ],
)
def test_refused_in_one_line(
    cache: Path, options: dict[str, Any], straight: Path, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(LogitcaskError, match=rule) as caught:
        train(cache, straight, **{**options, **AGAIN, **changes})
    assert "\n" not in str(caught.value)


def test_a_new_run_cannot_be_extended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--extend applies to a run that is resumed: give --resume-from-checkpoint"):
        train_settings("c", tmp_path / "run", extend=True)
