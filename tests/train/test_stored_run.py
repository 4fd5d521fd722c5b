"""A run begun by the version of 2026-11-28 is resumed, and ends where that version's uninterrupted run ended."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import losses, train

STORED = Path(__file__).parent / "stored" / "begun.zip"
CACHE = Path(__file__).parents[1] / "cache" / "stored" / "format4.zip"


def test_it_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(STORED) as archive:
        archive.extractall("run")
    wanted = json.loads(Path("run/losses.json").read_text())
    shutil.move("run/student.json", "student.json")
    train(CACHE, Path("run"), student_config=Path("student.json"), max_steps=6, save_steps=3, batch_size=4,
          resume_from_checkpoint="latest")  # fmt: skip
    np.testing.assert_allclose(losses(Path("run")), wanted, rtol=1e-4)
