"""metrics.jsonl: its contents, and that a run killed and resumed leaves the same log as an uninterrupted one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.order import held_out
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.runs.run_folder import curve, read_log
from logitcask.pipeline.train.callbacks.metrics_log import _to_json
from logitcask.pipeline.train.memory_advice import RunSize
from tests.support.runs import history, metrics, train, train_settings
from tests.support.tiny import make_cache

MEASURED = {"seconds", "tokens_per_second", "peak_memory_mb"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


def learned(run: Path) -> list[dict[str, float | None]]:
    """The lines without measured times, speeds and memory."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_log(run)]


def test_the_log_is_the_trainers(cache: Path, tmp_path: Path) -> None:
    run = train(cache, tmp_path / "run", max_steps=5, eval_steps=2)
    lines = read_log(run)
    training = [line for line in lines if "total_loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    for line, trainers in zip(training, history(run), strict=True):
        assert trainers.items() <= line.items()
        assert {"hard_loss", "soft_loss", "perplexity", "learning_rate", "padding", "epoch"} <= line.keys()
        assert (line["tokens_per_second"] or 0) > 0
    assert all(100 < (line["peak_memory_mb"] or 0) < 100_000 for line in lines)
    seconds = [line["seconds"] or 0 for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    before, after = metrics(run)["before"], metrics(run)["after"]
    assert before.items() <= lines[0].items()
    assert after.items() <= lines[-1].items()


def test_tokens_are_those_of_the_epochs_examples(cache: Path, tmp_path: Path) -> None:
    """Steps after the last regular log line are covered by the line of the last step."""
    run = train(cache, tmp_path / "run", max_steps=None, epochs=2, logging_steps=4, eval_fraction=0)
    manifest = json.loads((cache / "zarr.json").read_text())["attributes"]["logitcask"]
    steps, tokens = curve(read_log(run), "tokens")
    assert steps == [4, 6]
    assert sum(tokens) == 2 * manifest["data"]["tokens"]


def test_a_killed_and_resumed_run_has_the_log_of_an_uninterrupted_one(cache: Path, tmp_path: Path) -> None:
    how = {"max_steps": 6, "save_steps": 3, "logging_steps": 2, "eval_steps": 3}
    whole = train(cache, tmp_path / "whole", **how)
    run = tmp_path / "run"
    train(cache, run, **how)
    for folder in (run / "checkpoint-6", run / "final"):
        folder.rename(tmp_path / f"lost {folder.name}")
    before = read_log(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "total')  # killed while writing
    train(cache, run, **how, resume_from_checkpoint="latest")
    assert learned(run) == learned(whole)
    after = read_log(run)
    assert after[:4] == before[:4]  # steps 0, 2, 3 and its evaluation
    assert after[3]["step"] == 3
    assert (after[4]["seconds"] or 0) > (after[3]["seconds"] or 0)  # time before the kill counts


def test_a_log_alone_does_not_block_a_new_run(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_total_loss": 1.0}\n{"step": 1, "total_loss": 1.0}\n')
    train(cache, run, max_steps=1, eval_fraction=0)
    assert [line["step"] for line in read_log(run)] == [1]
    assert "padding" in read_log(run)[0]
    with pytest.raises(LogitcaskError, match="not an empty folder"):
        train(cache, run, max_steps=1)


def test_non_finite_numbers_become_null() -> None:
    text = _to_json({"step": 1, "perplexity": math.inf, "total_loss": math.nan})
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "perplexity": None, "total_loss": None}


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": 1.5}', '{"step": 1, "total_loss": "x"}', '{"step": true}'])
def test_a_damaged_log_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(LogitcaskError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_log(tmp_path)


def size(steps: int, held_out: float, **changes: Any) -> RunSize:
    """Return a run of ``steps`` steps of 8 examples, 4 batches per epoch, of 10 positions each."""
    size = RunSize(Amount(40, 800, 400), 8, held_out, 4, 32, 320.0, 1, 1, 1.0, steps)
    return replace(size, **changes)


@pytest.mark.parametrize(
    ("run", "every"),
    [
        (size(40, 80), 4),
        (size(4, 10), 1),
        (size(43, 80), 4),
        (size(1000, 80), 100),
        (size(4, 80), 2),  # 192 positions may be evaluated for 320 that are trained on
        (size(1, 80), None),
    ],
)
def test_a_run_evaluates_about_ten_times_if_that_takes_little(run: RunSize, every: int | None) -> None:
    assert run.eval_steps(at_any_cost=False) == every
    assert run.eval_steps(at_any_cost=True) == max(1, round(run.steps()[0] / 10))


def test_by_default_ten_evaluations_are_logged_with_the_teachers_own_loss(cache: Path, tmp_path: Path) -> None:
    """The teacher's loss is the same at each, and is that of the labels; without labels it is not known."""
    run = train(cache, tmp_path / "run", max_steps=20)
    held = [line for line in read_log(run) if "eval_total_loss" in line]
    assert [line["step"] for line in held] == list(range(0, 21, 2))
    reader = CacheReader(cache)
    gold = np.concatenate([reader.example(int(i)).targets.gold_logprobs for i in held_out(len(reader), 0.1, 0)])
    for line in held:
        assert line["eval_teacher_hard_loss"] == pytest.approx(-gold.mean(), rel=1e-5)
        assert line["eval_teacher_perplexity"] == pytest.approx(np.exp(-gold.mean()), rel=1e-5)
    text = train(cache, tmp_path / "text", distillation_type="output", max_steps=2)
    assert not any("eval_teacher_hard_loss" in line for line in read_log(text))


def test_by_default_few_examples_are_held_out(tmp_path: Path) -> None:
    settings = train_settings("c", tmp_path / "run", eval_fraction=None)
    assert [settings.held_out_fraction(n) * n for n in (100, 10_000, 1_000_000)] == [5, 500, 500]
    assert train_settings("c", tmp_path / "run", eval_fraction=0.1).held_out_fraction(1_000_000) == 0.1
