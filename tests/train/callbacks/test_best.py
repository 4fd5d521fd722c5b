"""The best checkpoint becomes final, a run stops early, figures from a cache of their own; all of it across resumes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.run_folder import read_log
from tests.support.runs import STUDENT, losses, metrics, train, weights, write_config
from tests.support.tiny import RECORDS, make_cache, make_teacher, write_jsonl

PLACE = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache to train on, and one of other examples by the same teacher with a smaller preset."""
    folder = tmp_path_factory.mktemp("best")
    teacher = make_teacher(folder / "teacher")
    make_cache(folder, teacher, output=folder / "cache")
    others = [{**record, "response": f"Not {n}, {record['response']}"} for n, record in enumerate(RECORDS[:6])]
    make_cache(
        folder, teacher, output=folder / "eval", train_data=str(write_jsonl(folder / "e.jsonl", others)), head_size=2
    )
    write_config(folder / "student.json", STUDENT)
    return folder


def options(place: Path, **changes: object) -> dict[str, Any]:
    """Return the options of a run that is best in its middle: a rate that rises until it does harm."""
    return {
        "student_config": place / "student.json",
        "eval_cache": str(place / "eval"),
        "eval_fraction": 0.0,
        "eval_steps": 1,
        "save_steps": 4,
        "save_total_limit": 2,
        "max_steps": 10,
        "batch_size": 4,
        "warmup_steps": 10,
        "learning_rate": 0.3,
        **changes,
    }


def held_out(run: Path) -> dict[int, float]:
    """Return the held-out loss after each step."""
    lines = [line for line in read_log(run) if "eval_total_loss" in line]
    return {int(line["step"] or 0): float(line["eval_total_loss"] or 0) for line in lines}


@pytest.fixture(scope="module")
def best(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(place / "cache", tmp_path_factory.mktemp("straight") / "run", **options(place, load_best=True))


def test_final_is_the_best_step_and_the_figures_are_of_the_other_cache(place: Path, best: Path, tmp_path: Path) -> None:
    by_step = held_out(best)
    step = min(range(1, 11), key=by_step.__getitem__)
    assert 1 <= step < 10
    assert step % 4
    assert metrics(best)["best"] == {"step": step, "eval_total_loss": by_step[step]}
    assert metrics(best)["after"]["eval_total_loss"] == pytest.approx(by_step[step], rel=1e-6)
    stored = weights(best / f"checkpoint-{step}")
    assert all(torch.equal(tensor, weights(best / "final")[name]) for name, tensor in stored.items())
    assert {folder.name for folder in best.glob("checkpoint-*")} == {f"checkpoint-{step}", "checkpoint-10"}
    last = train(place / "cache", tmp_path / "last", **options(place))
    assert losses(last) == losses(best)
    assert metrics(last)["after"]["eval_total_loss"] == pytest.approx(by_step[10], rel=1e-6)
    assert "best" not in metrics(last)


def test_the_best_so_far_is_remembered_where_the_run_is_moved(
    place: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the best step, moved, resumed; then its final/ is lost, and made again."""
    run = shutil.copytree(best, tmp_path / "moved")
    for name in ("final", "checkpoint-10"):
        shutil.rmtree(run / name)
    (run / "metrics.json").unlink()
    how = options(place, load_best=True)
    train(place / "cache", run, **how, resume_from_checkpoint="latest")
    assert metrics(run) == metrics(best)
    assert held_out(run) == held_out(best)
    shutil.rmtree(run / "final")
    train(place / "cache", run, **how, resume_from_checkpoint="latest")
    for name, tensor in weights(best / "final").items():
        assert torch.equal(tensor, weights(run / "final")[name])
    capsys.readouterr()
    train(place / "cache", run, **how, resume_from_checkpoint="latest")
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_stops_early_stays_so_and_goes_on_with_more_patience(
    place: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_step, how = held_out(best), options(place, early_stopping_patience=2)
    lowest, waited, end = float("inf"), 0, 10
    for step in range(1, 11):
        waited = 0 if by_step[step] < lowest else waited + 1
        lowest = min(lowest, by_step[step])
        if waited == 2:
            end = step
            break
    assert 2 < end < 10
    run = train(place / "cache", tmp_path / "run", **how)
    said = capsys.readouterr().err
    assert max(held_out(run)) == end
    assert f"stopped early: step {end} of 10, after 2 evaluations without a lower held-out loss" in said
    assert re.search(r"best held-out loss: [0-9.]+ at step \d+\n", said)
    train(place / "cache", run, **how, resume_from_checkpoint="latest")
    assert "nothing to do" in capsys.readouterr().out
    early, extended = (shutil.copytree(run, tmp_path / name) for name in ("early", "extended"))
    state = json.loads((early / f"checkpoint-{end}/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BestSoFar"]["attributes"]["early_stopping_patience_counter"] == 2
    train(place / "cache", early, **{**how, "early_stopping_patience": 9}, resume_from_checkpoint="latest")
    assert held_out(early) == by_step
    again = {**how, "max_steps": 14, "resume_from_checkpoint": "latest", "extend": True}
    train(place / "cache", extended, **again)
    assert f"stopped early: step {end + 2} of 14, after 2 evaluations" in capsys.readouterr().err  # it counts anew
    assert {step: held_out(extended)[step] for step in range(end + 1)} == held_out(run)
    assert max(held_out(extended)) == end + 2
    assert json.loads((extended / "final/settings.json").read_text())["extended_at"] == [end]
    train(place / "cache", extended, **again)
    assert f"it stopped early at step {end + 2} of 14, final/ is saved; nothing to do" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_refused(place: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path, make_teacher(tmp_path / "teacher", vocab_size=290), output=tmp_path / "other")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"load_best": True, "eval_cache": None}, "--load-best needs an --eval-cache, or an --eval-fraction above 0"),
        ({"early_stopping_patience": 1, "eval_cache": None, "eval_fraction": 0.0}, "--early-stopping-patience needs"),
        ({"eval_fraction": 0.1}, "--eval-cache and --eval-fraction: give one of them"),
        ({"eval_cache": str(other)}, "other: was made with another tokenizer than"),
        ({"eval_cache": str(place / "none")}, "none"),
    ]
    for changes, message in cases:
        given = options(place)
        with pytest.raises((LogitcaskError, ValueError)) as caught:
            train(place / "cache", tmp_path / "run", **{**given, **changes})
        assert message in str(caught.value)
