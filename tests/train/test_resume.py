"""Checkpoints from which a run must not be resumed, and the exit code after an interrupt."""

import sys
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline import cli
from logitcask.pipeline.precompute import precompute
from tests.support.runs import train
from tests.support.tiny import make_cache, make_teacher


def test_a_run_is_not_resumed_on_the_labels_of_another_teacher(tmp_path: Path) -> None:
    """The same text, labelled by other weights: the data's fingerprint alone could not distinguish the two."""
    one = make_cache(tmp_path)
    other = make_cache(tmp_path, make_teacher(tmp_path / "other", seed=1), output=tmp_path / "labels of another")
    run = train(one, tmp_path / "run", save_steps=2)
    with pytest.raises(LogitcaskError, match="is a checkpoint of another run: source: checkpoint"):
        train(other, run, save_steps=2, resume_from_checkpoint="latest")


def test_damaged_settings_of_a_checkpoint_are_one_line(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    run = train(cache, tmp_path / "run", save_steps=2)
    for file in run.glob("checkpoint-*/settings.json"):
        file.write_text("{")
    with pytest.raises(LogitcaskError, match=r"settings\.json: damaged: no older complete checkpoint is beside it"):
        train(cache, run, save_steps=2, resume_from_checkpoint=str(run / "checkpoint-2"))


def test_an_interrupt_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(precompute, "precompute", interrupted)
    options = ["--teacher-model", "t", "--train-data", "d", "--output", str(tmp_path / "c")]
    monkeypatch.setattr(sys, "argv", ["logitcask", "precompute-logits", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
