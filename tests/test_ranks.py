"""Stage 2 on two ranks over gloo: the losses and weights of one rank with the whole batch; a lost rank ends the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints import SETTINGS_FILE
from tests.runs import STUDENT, history, write_config
from tests.servers import free_port
from tests.tiny import make_cache

ROUNDING = 1e-4
STEPS = {"save-steps": 3, "logging-steps": 1, "learning-rate": 1e-3, "warmup-steps": 0, "eval-fraction": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose 22 examples for training fill no step of eight, at ``cache``."""
    place = tmp_path_factory.mktemp("ranks")
    make_cache(place, shard_positions=64)
    write_config(place / "student.json", STUDENT)
    return place


def command(folder: Path, output: str, ranks: int, **options: object) -> list[str]:
    values = {**STEPS, "cache": folder / "cache", "student-config": folder / "student.json", "device": "cpu", **options}
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return [sys.executable, *launch, "-m", "pipeline.cli", "train", f"--output-dir={folder / output}", *flags]


def run(folder: Path, output: str, ranks: int, **options: object) -> Path:
    found = subprocess.run(command(folder, output, ranks, **options), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder / output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same(found: Path, want: Path) -> None:
    for a, b in zip(history(found), history(want), strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=ROUNDING)
        assert a["hard_loss"] == pytest.approx(b["hard_loss"], rel=ROUNDING)
    for name, tensor in weights(want).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Two epochs of one rank."""
    return run(folder, "one", 1, batch_size=8, epochs=2)


def test_two_ranks_are_one_with_the_whole_batch(folder: Path, one: Path) -> None:
    """The last step of an epoch has examples for one rank alone: each comes once."""
    assert_same(run(folder, "two", 2, batch_size=4, epochs=2), one)


def test_accumulated_steps_are_the_same(folder: Path, one: Path) -> None:
    assert_same(run(folder, "accumulated", 2, batch_size=2, gradient_accumulation_steps=2, epochs=2), one)


def test_a_lost_rank_ends_the_run_and_it_can_be_resumed(folder: Path, one: Path) -> None:
    with subprocess.Popen(command(folder, "lost", 2, batch_size=4, epochs=2), stderr=subprocess.PIPE) as parent:
        victim = None
        for _ in range(6000):
            if (folder / "lost/checkpoint-3" / SETTINGS_FILE).exists() and (victim := ranks_of(parent.pid)):
                os.kill(victim[-1], signal.SIGKILL)
                break
            assert parent.poll() is None, "it ended before a rank was killed"
            time.sleep(0.01)
        assert victim
        _, errors = parent.communicate(timeout=120)
        assert parent.returncode != 0
        assert b"SIGKILL" in errors or b"-9" in errors
    assert_same(run(folder, "lost", 2, batch_size=4, epochs=2, resume_from_checkpoint="latest"), one)


def ranks_of(parent: int) -> list[int]:
    """Processes that torchrun started."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and "pipeline.cli" in (place.parent / "cmdline").read_text():
            found.append(int(place.parent.name))
    return sorted(found)
