"""One run at a time trains in a folder."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.train.resume import saving
from logitcask.pipeline.train.resume.saving import sole_run
from tests.support.runs import train
from tests.support.tiny import make_cache


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both could begin while the folder is empty, and would write into each other's log and checkpoints."""
    monkeypatch.setattr(saving, "PATIENCE", 0.3)
    cache, run = make_cache(tmp_path), tmp_path / "run"
    with sole_run(run):
        with pytest.raises(LogitcaskError, match="run: another run is training in it: wait for it or choose another"):
            train(cache, run)
        assert list(run.iterdir()) == []
    assert not run.exists(), "an empty folder is not left behind"
    train(cache, run)
    assert (run / "final").is_dir()


def test_processes_that_outlive_a_killed_run_for_a_moment_are_waited_for(tmp_path: Path) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    ended = threading.Event()

    def end() -> None:
        ended.set()
        os.close(held)

    threading.Timer(0.5, end).start()
    with sole_run(tmp_path):
        assert ended.is_set()


def test_where_there_are_no_locks_there_is_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(number: int) -> None:
        raise LogitcaskError("writing needs file locks, which this system lacks: use Linux or macOS")

    monkeypatch.setattr(saving, "lock_file", no_locks)
    with sole_run(tmp_path / "run"), sole_run(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
