"""A resumed run continues its run in each tracker; W&B without a key, or a tracker that refuses, is one line."""

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from logitcask.pipeline.mistakes import error_lines
from logitcask.pipeline.train.callbacks.trackers import new_wandb_id, trackers
from tests.support.forked import alone
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import make_cache


def train(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options = [f"--cache={folder / 'cache'}", f"--student-config={folder / 'student.json'}", "--max-steps=4",
               f"--output-dir={folder / 'run'}", "--device=cpu", "--save-steps=2", "--logging-steps=1"]  # fmt: skip
    environment = {**dict.fromkeys(("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_MODE")), "WANDB_DIR": str(folder),
                   "HOME": str(folder / "home"), "TRACKIO_DIR": str(folder / "trackio"), **variables}  # fmt: skip
    return alone(folder, ["train", *options, *words], environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trackers")
    make_cache(place)
    write_config(place / "student.json", STUDENT)
    (place / "home").mkdir()
    return place


def test_a_resumed_run_is_the_same_run_in_each_tracker(folder: Path) -> None:
    chosen = ("--use-wandb", "--use-trackio", "--use-tensorboard")
    ran = train(folder, *chosen, WANDB_MODE="offline")
    assert ran.returncode == 0, ran.stderr[-3000:]
    run = folder / "run"
    record = json.loads((run / "checkpoint-2/settings.json").read_text())
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(run / name)
    ran = train(folder, *chosen, "--resume-from-checkpoint=latest", WANDB_MODE="offline")
    assert ran.returncode == 0, ran.stderr[-3000:]
    ids = [place.name.rpartition("-")[2] for place in sorted(folder.glob("wandb/offline-run-*"))]
    assert ids == [record["wandb_run_id"]] * 2
    assert json.loads((run / "final/settings.json").read_text())["wandb_run_id"] == record["wandb_run_id"]
    with sqlite3.connect(folder / "trackio" / "logitcask.db") as database:
        assert database.execute("select distinct run_name from metrics").fetchall() == [(str(run),)]
    assert {file.parent for file in folder.rglob("events.out.tfevents.*")} == {run / "tensorboard"}


def test_wandb_without_a_key_is_one_line_before_anything_is_done(folder: Path, tmp_path: Path) -> None:
    for name in ("cache", "student.json"):
        (tmp_path / name).symlink_to(folder / name)
    ran = train(tmp_path, "--use-wandb")
    assert ran.returncode == 2
    remedy = "run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline"
    message = f"--use-wandb: No API key configured. Use `wandb login` to log in: {remedy}"
    assert ran.stderr == error_lines(message, "logitcask train")
    assert ran.stdout == ""
    assert not list((tmp_path / "run").glob("*"))


def test_other_ranks_need_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", None)
    assert len(trackers(tmp_path, "p", wandb=True, tensorboard=False, trackio=False, reports=False)) == 1


def test_an_id_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert new_wandb_id() != new_wandb_id()
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert new_wandb_id() == "mine"
