"""One interrupted run, which the tests of resuming share."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import STUDENT, train, write_config
from tests.support.tiny import make_cache


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    student = write_config(tmp_path_factory.mktemp("student") / "student.json", STUDENT)
    return {"student_config": student, "max_steps": 6, "save_steps": 2, "save_total_limit": 9, "batch_size": 4}


@pytest.fixture(scope="session")
def straight(cache: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with checkpoints 2, 4 and 6."""
    return train(cache, tmp_path_factory.mktemp("straight") / "run", **options)


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 4."""
    shutil.copytree(straight, tmp_path / "run")
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run/metrics.json").unlink()
    return tmp_path / "run"
