"""Every file of configs/runs loads, and the processor's one trains."""

from pathlib import Path

import pytest

from pipeline.config import resolve
from pipeline.settings import TrainSettings
from pipeline.train import run_training
from tests.runs import STUDENT, losses, write_config
from tests.tiny import make_cache

RUNS = Path(__file__).parent.parent / "configs" / "runs"
FILES = sorted(RUNS.glob("*"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_settings_of_a_student_that_is_there(file: Path, tmp_path: Path) -> None:
    found = resolve(TrainSettings, file, {"cache": "c", "output_dir": str(tmp_path)})
    assert found.student_config is not None
    assert (RUNS.parent.parent / found.student_config).is_file()


def test_the_laptops_are_there() -> None:
    assert {"laptop-cpu", "laptop-mps", "laptop-8gb-gpu"} <= {file.stem for file in FILES}


def test_the_processors_file_trains_a_step(tmp_path: Path) -> None:
    flags = {"cache": str(make_cache(tmp_path)), "output_dir": str(tmp_path / "run"), "max_steps": 1,
             "student_config": str(write_config(tmp_path / "student.json", STUDENT)), "logging_steps": 1}  # fmt: skip
    run_training(resolve(TrainSettings, RUNS / "laptop-cpu.yaml", flags))
    assert len(losses(tmp_path / "run")) == 1
