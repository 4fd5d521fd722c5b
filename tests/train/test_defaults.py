"""Defaults by student and device: printed, stored as resolved, and kept by a resumed run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.pipeline.train.arguments import with_defaults
from tests.support.runs import losses, train, train_settings
from tests.support.tiny import make_cache, make_teacher


@pytest.mark.parametrize(
    ("student", "rate", "words"),
    [
        ({"student_config": "tiny"}, 5e-4, "a new student"),
        ({"init_from_teacher_layers": "0, 9", "teacher_model": "m"}, 1e-4, "layers of a teacher"),
        ({"student_model": "m"}, 1e-5, "a pretrained student"),
        ({"student_model": "m", "lora_rank": 8}, 2e-4, "an adapter"),
    ],
)
def test_the_rate_follows_the_student(tmp_path: Path, student: dict[str, Any], rate: float, words: str) -> None:
    settings, reason = with_defaults(train_settings("c", tmp_path / "run", **student))
    assert settings.learning_rate == rate
    assert settings.use_mixed_precision is False  # on a CPU
    assert reason == f"the default for {words}"
    given, reason = with_defaults(train_settings("c", tmp_path / "run", **student, learning_rate=1e-3))
    assert given.learning_rate == 1e-3
    assert reason == ""


def test_a_dtype_that_a_cpu_has_no_instructions_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {"architecture": "x86_64", "avx512_bw": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    cache = make_cache(tmp_path, dtype="bfloat16")
    train(cache, tmp_path / "half", max_steps=1, use_mixed_precision=True)
    assert capfd.readouterr().err.count("this CPU has no instructions for bfloat16") == 2
    train(cache, tmp_path / "plain", max_steps=1)
    known["avx512_bw"] = True
    train(cache, tmp_path / "new", max_steps=1, use_mixed_precision=True)
    assert "no instructions" not in capfd.readouterr().err


def test_a_resumed_run_keeps_what_it_began_with(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run of an earlier version, whose default for a pretrained student was 5e-4."""
    options: dict[str, Any] = {
        "student_model": str(make_teacher(tmp_path / "student")),
        "max_steps": 4,
        "save_steps": 2,
    }
    whole = train(cache, tmp_path / "whole", **options, learning_rate=5e-4)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    train(cache, again, **options, eval_fraction=None, resume_from_checkpoint="latest")
    assert losses(again) == losses(whole)
    assert "lr 0.0005 (as the run began)" in capfd.readouterr().err
    kept = json.loads((again / "final/settings.json").read_text())
    assert (kept["learning_rate"], kept["eval_fraction"]) == (5e-4, 0.1)


def test_a_short_run_warms_up_for_a_tenth_of_its_steps(cache: Path, tmp_path: Path) -> None:
    """Otherwise one of fewer steps than the usual warm-up would hardly learn."""
    for name, steps, changes, first in (
        ("one", 1, {}, 5e-4),
        ("short", 20, {}, 0.0),
        ("given", 2, {"warmup_steps": 1}, 0.0),
        ("share", 2, {"training_args": {"warmup_ratio": 0.5}}, 0.0),
    ):
        options = {"max_steps": steps, "eval_fraction": 0.0, "warmup_steps": None, **changes}
        rates = losses(train(cache, tmp_path / name, **options), "learning_rate")
        assert rates[0] == pytest.approx(first)
        assert max(rates) == pytest.approx(5e-4)
        assert rates.index(max(rates)) == (0 if first else 2 if steps == 20 else 1)
