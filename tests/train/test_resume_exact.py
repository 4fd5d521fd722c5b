"""A resumed run is exact or refused: its checkpoints' files, names and end."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.run_folder import complete_checkpoints, latest_checkpoint, read_log, read_run
from tests.support.runs import losses, metrics, train, weights
from tests.support.tiny import folder_bytes


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """Change one byte of a tensor: torch.load reads it without complaint."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def pickled(file: Path) -> None:
    torch.save({"param_groups": [], "last_epoch": 1, "python": Code()}, file)


def bare_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Code()))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other(file: Path) -> None:
    """Sound files of their kind that hold something else."""
    if file.suffix == ".json":
        file.write_text("[]")
    else:
        torch.save([1], file)


TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
DAMAGES = [
    *((name, Path.unlink, "missing") for name in (*TORCH_FILES, "trainer_state.json", "model.safetensors")),
    *((name, cut, "damaged") for name in (*TORCH_FILES, "trainer_state.json", "model.safetensors")),
    *((name, empty, "damaged") for name in (*TORCH_FILES, "trainer_state.json", "model.safetensors", "settings.json")),
    *((name, harm, "damaged") for name in TORCH_FILES for harm in (pickled, bare_pickle)),
    *((name, other, "damaged") for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "settings.json")),
    ("optimizer.pt", flip, "damaged"),
]


@pytest.mark.parametrize(
    ("name", "harm", "rule"), DAMAGES, ids=[f"{name} {harm.__name__}" for name, harm, _ in DAMAGES]
)
def test_a_missing_or_damaged_file_is_refused(
    cache: Path,
    options: dict[str, Any],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    harm: Callable[[Path], None],
    rule: str,
) -> None:
    """The line names the file and the next older checkpoint; no code of a checkpoint runs; nothing is changed."""
    monkeypatch.chdir(run.parent)
    harm(run / "checkpoint-4" / name)
    before = folder_bytes(run)
    with pytest.raises(LogitcaskError) as refused:
        train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-4"))
    message = str(refused.value)
    assert message.startswith(f"{run / 'checkpoint-4' / name}: {rule}"), message
    assert message.endswith(f": resume with --resume-from-checkpoint {run / 'checkpoint-2'}"), message
    assert "\n" not in message
    assert not Path("ran").exists()
    assert folder_bytes(run) == before


def test_a_checkpoint_of_deepspeed_is_refused(cache: Path, options: dict[str, Any], run: Path) -> None:
    """By the file it leaves, since it does not run on a CPU; without that line optimizer.pt would be called missing."""
    (run / "checkpoint-4/optimizer.pt").unlink()
    (run / "checkpoint-4/latest").write_text("global_step4")
    with pytest.raises(LogitcaskError, match=r"checkpoint-4: was saved by DeepSpeed, .*: start over, or train"):
        train(cache, run, **options, resume_from_checkpoint="latest")


def test_a_pickle_that_is_not_read_is_not_run(
    cache: Path, options: dict[str, Any], straight: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer writes training_args.bin; ours have none, and one that is there is left alone."""
    assert not list(straight.rglob("training_args.bin"))
    monkeypatch.chdir(run.parent)
    bare_pickle(run / "checkpoint-4/training_args.bin")
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert not Path("ran").exists()
    assert losses(run) == losses(straight)


def test_resumed_from_the_older_checkpoint_that_is_named(
    cache: Path, options: dict[str, Any], straight: Path, run: Path
) -> None:
    cut(run / "checkpoint-4/optimizer.pt")
    train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(run) == losses(straight)
    torch.testing.assert_close(weights(run / "final"), weights(straight / "final"), rtol=0.0, atol=0.0)
    assert metrics(run) == metrics(straight)


@pytest.mark.parametrize(
    "name", ["checkpoint-best", "checkpoint-4.old", "checkpoint-", "checkpoint-²", "checkpoint--1"]
)
def test_folders_of_other_names_are_no_checkpoints_of_a_run(
    cache: Path, options: dict[str, Any], straight: Path, run: Path, name: str
) -> None:
    shutil.copytree(run / "checkpoint-2", run / name)
    assert latest_checkpoint(run) == run / "checkpoint-4"
    assert complete_checkpoints(run) == [run / "checkpoint-2", run / "checkpoint-4"]
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert losses(run) == losses(straight)


def test_a_checkpoint_may_be_given_by_another_name(
    cache: Path, options: dict[str, Any], straight: Path, run: Path
) -> None:
    (run / "checkpoint-4").rename(run / "checkpoint-best")
    train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-best"))
    assert losses(run) == losses(straight)
    cut(run / "checkpoint-best/scheduler.pt")
    with pytest.raises(LogitcaskError, match=r"scheduler\.pt: damaged .*: resume with --resume-from-.*/checkpoint-6"):
        train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-best"))


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("final", r"final: is a finished student without .*: give a checkpoint, such as .*/run/checkpoint-6; to train"),
        (".", r"is the folder of a run: give one of its checkpoints, such as .*/run/checkpoint-6"),
        ("checkpoint-4", r"checkpoint-4: not a complete checkpoint .*: resume with --resume-from-.*/run/checkpoint-2"),
        ("nowhere", r"nowhere: not a complete checkpoint of a run: "),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_to_give(
    cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path, place: str, rule: str
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    (run / "checkpoint-4/settings.json").unlink()
    with pytest.raises(LogitcaskError, match=rule):
        train(cache, run, **options, resume_from_checkpoint=str(run / place))


# the end


def test_a_finished_run_is_left_as_it_is(
    cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    before = folder_bytes(run)
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert folder_bytes(run) == before
    assert capsys.readouterr().out == f"complete  {run}: all 6 steps are done, final/ is saved; nothing to do\n"


@pytest.mark.parametrize("lost", ["final", "final/settings.json", "metrics.json"])
def test_a_finished_run_trains_no_more_and_saves_what_is_missing(
    cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path, lost: str
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run / lost) if lost == "final" else (run / lost).unlink()
    train(cache, run, **options, resume_from_checkpoint="latest")
    wanted, actual = folder_bytes(straight), folder_bytes(run)
    changed = {name for name in wanted.keys() | actual.keys() if wanted.get(name) != actual.get(name)}
    assert changed <= {
        "metrics.jsonl",
        "final/settings.json",
    }  # a second line of the last evaluation; how it was resumed
    assert metrics(run)["before"] == metrics(straight)["before"]
    assert read_run(run).after == read_run(straight).after


@pytest.mark.parametrize("lost", [(), ("final", "checkpoint-5"), ("final", "checkpoint-5", "checkpoint-4")])
def test_fractional_epochs_are_the_same_steps_when_resumed(
    cache: Path, options: dict[str, Any], tmp_path: Path, lost: tuple[str, ...]
) -> None:
    """22 examples to train on, 6 steps per epoch: 0.7 epochs are 5 steps, which end within the epoch."""
    changes = {**options, "max_steps": None, "epochs": 0.7, "save_steps": 1}
    whole = train(cache, tmp_path / "whole", **changes)
    run = shutil.copytree(whole, tmp_path / "run")
    for name in lost:
        shutil.rmtree(run / name)
    train(cache, run, **changes, resume_from_checkpoint="latest")
    assert len(losses(run)) == 5
    assert losses(run) == losses(whole)
    assert metrics(run)["before"] == metrics(whole)["before"]
    assert metrics(run)["after"]["eval_total_loss"] == metrics(whole)["after"]["eval_total_loss"]
    torch.testing.assert_close(weights(run / "final"), weights(whole / "final"), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"), [(0.1, 1, 1), (0.5, 1, 3), (1.4, 1, 9), (2.0, 4, 4), (0.3, 4, 1), (1.01, 4, 3)]
)
def test_the_summary_counts_the_steps_that_are_trained(
    cache: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    epochs: float, accumulation: int, steps: int,
) -> None:  # fmt: skip
    run = train(cache, tmp_path / "run", **{**options, "max_steps": None, "epochs": epochs},
                gradient_accumulation_steps=accumulation)  # fmt: skip
    assert f"plan      {steps} step" in capsys.readouterr().err
    assert max(line["step"] or 0 for line in read_log(run)) == steps
    assert latest_checkpoint(run) == run / f"checkpoint-{steps}"


def test_extending_a_finished_run_is_refused_with_the_difference(
    cache: Path, options: dict[str, Any], straight: Path
) -> None:
    """The cosine schedule of more steps has other learning rates from the start."""
    with pytest.raises(LogitcaskError, match="another run: max_steps: checkpoint has 6, this run has 8; use"):
        train(cache, straight, **{**options, "max_steps": 8}, resume_from_checkpoint="latest")
    with pytest.raises(LogitcaskError, match=r"another run: epochs: checkpoint has 1\.0, this run has 2\.0"):
        train(cache, straight, **options, epochs=2.0, resume_from_checkpoint="latest")


def test_a_resumed_run_keeps_its_evaluation_before(
    cache: Path, options: dict[str, Any], straight: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert metrics(run) == metrics(straight)
    perplexity = metrics(straight)["before"]["eval_perplexity"]
    assert f"{perplexity:,.3f}" in capsys.readouterr().out


# the global batch
