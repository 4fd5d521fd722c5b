"""The golden run: the first losses of the smallest config, stored in a file. A change that moves them must say why.

``python -m tests.train.test_golden`` rewrites the file.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from tests.support.runs import losses
from tests.support.tiny import make_cache

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20


def golden_run(folder: Path) -> list[float]:
    """Return total losses of the first steps of configs/runs/hybrid-tiny.yaml, from a tiny random teacher's cache."""
    flags = {
        "cache": str(make_cache(folder)),
        "student_config": ROOT / "configs" / "students" / "tiny.json",
        "output_dir": folder / "run",
        "max_steps": STEPS,
        "warmup_steps": STEPS,
        "logging_steps": 1,
        "device": "cpu",
    }
    run_training(resolve(TrainSettings, ROOT / "configs" / "runs" / "hybrid-tiny.yaml", flags))
    return losses(folder / "run")


def test_the_first_losses_are_the_golden_ones(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == STEPS
    np.testing.assert_allclose(golden_run(tmp_path), golden, rtol=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in golden_run(Path(place))], indent=1) + "\n")
