"""Alpha and temperature that change over a run: every step's value is that of the formula, also when resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.batches.scheduled import ScheduledSampler
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.settings.training.schedule import Ramp
from tests.support.runs import history, losses, metrics, train, train_settings, weights

SCHEDULES = {"alpha": "0.6:0.1", "temperature": "2:1"}  # the cache stores 1, 1.5 and 2
STEPS = 6


def test_a_line_is_exact_at_its_ends() -> None:
    line = Ramp(0.1, 0.3)
    assert [line.at(step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert (line.at(0, 7), line.at(6, 7), line.at(0, 1)) == (0.1, 0.3, 0.1)
    assert [Ramp(2, 1).nearest(step, 5, [1, 1.5, 2]) for step in range(5)] == [2, 1.5, 1.5, 1, 1]
    assert [Ramp(1, 2).nearest(step, 5, [1, 1.5, 2]) for step in range(5)] == [1, 1.5, 1.5, 2, 2]


def test_batches_of_a_step_have_its_temperature() -> None:
    """Three batches per epoch, two per step: the last step of an epoch has one; the worst case of resuming is none."""
    sampler = BatchSampler(torch.tensor([0, 6]).numpy(), torch.zeros(0, dtype=torch.long).numpy(), 2, seed=0)
    batches = ScheduledSampler(sampler, Ramp(3.0, 0.0), [0, 1, 2, 3, 4], accumulation=2, steps=4)
    found = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        found += [{temperature for _, temperature in batch} for batch in batches]
        assert sorted(index for batch in batches for index, _ in batch) == list(range(6))
    assert found == [{3}, {3}, {2}, {1}, {1}, {0}]


@pytest.fixture(scope="module")
def scheduled(cache: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cache, tmp_path_factory.mktemp("scheduled") / "run", **options, **SCHEDULES)


def expected_alphas(first: int = 0, steps: int = STEPS) -> list[float]:
    return [0.6 - 0.5 * step / (steps - 1) for step in range(first, steps)]


def test_each_step_is_that_of_a_run_of_its_values(
    cache: Path, options: dict[str, Any], scheduled: Path, tmp_path: Path
) -> None:
    """The first step equals that of a run at the first values, which a wrong temperature or alpha would not."""
    lines = history(scheduled)
    assert [line["alpha"] for line in lines] == pytest.approx(expected_alphas())
    assert [line["temperature"] for line in lines] == [2, 2, 1.5, 1.5, 1, 1]
    for line in lines:
        total = line["alpha"] * line["hard_loss"] + (1 - line["alpha"]) * line["soft_loss"]
        assert line["total_loss"] == pytest.approx(total, rel=1e-5)
    one = history(train(cache, tmp_path / "one", **{**options, "max_steps": 1, "alpha": 0.6, "temperature": 2}))[0]
    assert {name: lines[0][name] for name in ("total_loss", "soft_loss", "grad_norm")} == {
        name: one[name] for name in ("total_loss", "soft_loss", "grad_norm")
    }
    plain = train(cache, tmp_path / "plain", **options, alpha=0.1, temperature=1)
    assert metrics(scheduled)["before"] == metrics(plain)["before"]  # evaluated by the last values
    settings = (scheduled / "final/settings.json").read_text()
    assert '"alpha": "0.6:0.1"' in settings
    assert '"temperature": "2.0:1.0"' in settings


@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 2, "gradient_accumulation_steps": 2, "num_workers": 1}], ids=["same", "workers"]
)
def test_a_resumed_run_is_the_same(
    cache: Path, options: dict[str, Any], scheduled: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scheduled / "checkpoint-4", run / "checkpoint-4")
    train(cache, run, **{**options, **SCHEDULES, **changes}, resume_from_checkpoint="latest")
    for name in ("alpha", "temperature"):
        assert losses(run, name) == losses(scheduled, name)
    if not changes:
        torch.testing.assert_close(weights(run / "final"), weights(scheduled / "final"), rtol=0.0, atol=0.0)
    with pytest.raises(LogitcaskError, match=r"alpha: checkpoint has '0.6:0.1', this run has 0.1"):
        train(cache, run, **{**options, **SCHEDULES, "alpha": 0.1}, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"temperature": "3:1"}, "--temperature 3 is not stored in the cache: it holds 1, 1.5, 2"),
        ({"temperature": "1:1.2"}, "--temperature 1.2 is not stored in the cache: it holds 1, 1.5, 2"),
    ],
)
def test_a_schedule_that_leaves_the_stored_temperatures(
    cache: Path, tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(LogitcaskError, match=rule):
        train(cache, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"alpha": "0.5:2"}, "--alpha: must be less than or equal to 1, got '2'"),
        ({"alpha": "1.5"}, "--alpha: must be less than or equal to 1, got '1.5'"),
        ({"alpha": "0.5:"}, "--alpha: must be a valid number.* got ''"),
        ({"alpha": "0:1:2"}, "--alpha: must be a number, or FIRST:LAST, got '0:1:2'"),
        ({"temperature": "2:0"}, "--temperature: must be greater than 0, got '0'"),
        ({"temperature": "2:1", "min_fidelity": 0.5}, "--min-fidelity applies to one --temperature"),
        ({"alpha": "0.5:0", "distillation_type": "logit"}, "--alpha must be 0.0 for --distillation-type logit"),
        ({"cache": None, "train_data": "d", "teacher_model": "m", "temperature": "2:1"}, "FIRST:LAST applies to a c"),
    ],
)
def test_bad_values_are_one_line(tmp_path: Path, given: dict[str, Any], rule: str) -> None:
    flags = {"cache": "c", "output_dir": str(tmp_path), "student_config": "tiny", **given}
    with pytest.raises(LogitcaskError, match=rule) as caught:
        resolve(TrainSettings, None, {name: value for name, value in flags.items() if value is not None})
    assert "\n" not in str(caught.value)


def test_a_config_file_holds_them_as_typed(tmp_path: Path) -> None:
    """YAML 1.1 would read 2:1 as 121."""
    config = tmp_path / "run.yaml"
    config.write_text("alpha: 1:0.5\ntemperature: 2:1\n")
    settings = resolve(TrainSettings, config, {"cache": "c", "output_dir": tmp_path, "student_config": "tiny"})
    assert (settings.alphas, settings.temperatures) == (Ramp(1.0, 0.5), Ramp(2.0, 1.0))
    assert train_settings("c", tmp_path, **settings.model_dump(include={"alpha", "temperature"})) is not None
