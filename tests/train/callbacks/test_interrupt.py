"""The first SIGINT or SIGTERM saves a training run and stops it, the second stops it at once; also on several ranks."""

import json
import multiprocessing
import os
import pty
import runpy
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.pipeline.runs.run_folder import SETTINGS_FILE, latest_checkpoint
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.support.forked import calling, forks
from tests.support.runs import STUDENT, losses, metrics, train, train_settings, weights, write_config
from tests.support.servers import free_port
from tests.support.tiny import make_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a student with dropout, and at ``whole`` an uninterrupted run of 9 steps."""
    place = tmp_path_factory.mktemp("interrupts")
    make_cache(place)
    write_config(place / "student.json", {**STUDENT, "attention_dropout": 0.2})
    train(place / "cache", place / "whole", **options(place))
    return place


def options(folder: Path) -> dict[str, Any]:
    return {"student_config": folder / "student.json", "batch_size": 4, "gradient_accumulation_steps": 2,
            "max_steps": 9, "save_steps": 100}  # fmt: skip


@pytest.fixture(autouse=True)
def default_sigint() -> Iterator[None]:
    """Restore Python's SIGINT handler: background jobs, and tests run as one, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    *signals: signal.Signals,
    send: Callable[[signal.Signals], None] = signal.raise_signal,
) -> None:
    """Send signals in the middle of a step, in the first of its two forward passes."""
    plain, left = DistillationTrainer.training_step, list(signals)

    def interrupted(trainer: DistillationTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        while left and trainer.state.global_step == step - 1:
            send(left.pop())
        return plain(trainer, *arguments, **named)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_saves_and_the_resumed_run_equals_the_uninterrupted_one(
    number: signal.Signals,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, before = tmp_path / "run", signal.getsignal(number)
    interrupt(monkeypatch, 4, number)
    with pytest.raises(KeyboardInterrupt):
        train(folder / "cache", run, **options(folder))
    line = "interrupted: step 4 of 9 is saved: resume with the same command"
    assert capsys.readouterr().err.splitlines()[-1] == f"{line} and --resume-from-checkpoint latest"
    assert signal.getsignal(number) is before
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (run / "final").exists()
    interrupt(monkeypatch, 7, number)
    with pytest.raises(KeyboardInterrupt):
        train(folder / "cache", run, **options(folder), resume_from_checkpoint="latest")
    assert capsys.readouterr().err.splitlines()[-1] == line.replace("4", "7")
    train(folder / "cache", run, **options(folder), resume_from_checkpoint="latest")
    torch.testing.assert_close(weights(run / "final"), weights(folder / "whole/final"), rtol=0.0, atol=0.0)
    assert losses(run) == losses(folder / "whole")
    assert metrics(run)["after"] == metrics(folder / "whole")["after"]


def test_the_second_stops_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(folder / "cache", tmp_path / "run", **options(folder))
    assert latest_checkpoint(tmp_path / "run") is None


def test_in_the_last_step_the_run_just_ends(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 9, signal.SIGINT)
    assert_whole(folder, tmp_path)


def test_an_ignored_signal_stays_ignored(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt(monkeypatch, 4, signal.SIGINT)
    assert_whole(folder, tmp_path)


def test_a_terminals_interrupt_leaves_the_loaders_workers_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step still needs them; the Trainer's process decides whether to stop, and gets no signal here."""

    def send(number: signal.Signals) -> None:
        (worker,) = multiprocessing.active_children()
        assert worker.pid
        os.kill(worker.pid, number)

    interrupt(monkeypatch, 2, signal.SIGINT, send=send)
    run = train(folder / "cache", tmp_path / "run", **options(folder), num_workers=1)
    assert len(losses(run)) == 9  # with a worker, dropout differs after the first epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_a_terminal_that_is_gone_is_the_first(folder: Path, tmp_path: Path, workers: int) -> None:
    """As where an SSH connection is lost: every process that it started gets SIGHUP, and writing to it fails."""
    ours, theirs = pty.openpty()
    run = tmp_path / "run"
    words = ["train", "--cache", folder / "cache", "--student-config", folder / "student.json", "--output-dir", run,
             "--max-steps", 5000, "--logging-steps", 1, "--num-workers", workers]  # fmt: skip
    child = calling(train_in_a_terminal, os.ttyname(theirs), words)
    child.start()
    log, late = run / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < late
        assert child.is_alive()
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)
    child.join(60)
    assert child.exitcode == 130
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert (
        losses(run)[-1] == json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][-1]["total_loss"]
    )


def train_in_a_terminal(terminal: str, words: list[object]) -> None:
    """Run a command in a session whose terminal this is."""
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)
    for number in range(3):
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = ["logitcask", *map(str, words)]
    runpy.run_module("logitcask", run_name="__main__", alter_sys=True)


def assert_whole(folder: Path, place: Path) -> None:
    """Train a run and require it to end like the uninterrupted one."""
    try:
        run = train(folder / "cache", place / "run", **options(folder))
    except KeyboardInterrupt:
        pytest.fail("the run was stopped")
    assert metrics(run)["after"] == metrics(folder / "whole")["after"]


def test_all_ranks_stop_after_the_same_step_if_one_is_interrupted(folder: Path) -> None:
    context = forks()
    settings, port = train_settings(folder / "cache", folder / "ranks", **options(folder)), free_port()
    ranks = [context.Process(target=train_as_a_rank, args=(settings, rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [130, 130]
    said = [(folder / f"said by {rank}").read_text() for rank in range(2)]
    line = "interrupted: step 5 of 9 is saved: resume with the same command and --resume-from-checkpoint latest\n"
    assert said[0].endswith(line)
    assert "interrupted" not in said[1]
    (saved,) = (folder / "ranks").glob("checkpoint-*")
    assert saved.name == "checkpoint-5"
    assert {path.name for path in saved.iterdir()} >= {"rng_state_0.pth", "rng_state_1.pth", SETTINGS_FILE}


def train_as_a_rank(settings: TrainSettings, rank: int, port: int) -> None:
    """Train as one of two ranks, as a launcher would start it; rank 1 alone is interrupted, in step 4."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        (settings.output_dir.parent / f"said by {rank}").open("w") as sys.stderr,
        pytest.MonkeyPatch.context() as patch,
    ):
        interrupt(patch, 4, *[signal.SIGINT] * rank)
        try:
            run_training(settings)
        except KeyboardInterrupt:
            sys.exit(130)
