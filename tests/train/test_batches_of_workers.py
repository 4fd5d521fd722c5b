"""Batches come from worker processes through pipes: shared memory, of which containers have little, may be full."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from logitcask.pipeline.batches.loader import data_loader
from tests.support.needed import lacking
from tests.support.runs import STUDENT, losses, write_config
from tests.support.tiny import make_cache

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.bool]
SMALL = "mount -t tmpfs -o size=64k none /dev/shm && exec "


class Tensors(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(-3, 3).reshape(2, 3).to(DTYPES[index])


def shapes(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    """Whole ones, views, those without elements and those without dimensions."""
    return {"views": [view for t in tensors for view in (t, t[:, 1:], t.t(), t[:0], t[0, 0])]}


def test_tensors_of_every_type_arrive_outside_shared_memory() -> None:
    places = [list(range(len(DTYPES)))]
    (sent,) = data_loader(Tensors(), places, shapes, 1, pin_memory=False)
    (made,) = data_loader(Tensors(), places, shapes, 0, pin_memory=False)
    assert len(sent["views"]) == 5 * len(DTYPES)
    for ours, want in zip(sent["views"], made["views"], strict=True):
        assert (ours.dtype, ours.shape) == (want.dtype, want.shape)
        assert torch.equal(ours, want)
        assert not ours.is_shared()
        ours.zero_()  # can be written, as what a DataLoader gives


def refuse(_: list[Tensor]) -> dict[str, list[Tensor]]:
    raise ValueError("not such examples")


def test_an_error_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="not such examples"):
        next(iter(data_loader(Tensors(), [[0]], refuse, 1, pin_memory=False)))


@pytest.mark.nightly
def test_a_run_with_64_kilobytes_of_shared_memory() -> None:
    """It once waited forever for a batch that did not fit. Containers have 64 MB by default."""
    place = Path(tempfile.mkdtemp())
    try:
        if place.is_relative_to("/dev/shm"):
            lacking("temporary files are in the shared memory itself")
        make_cache(place)
        write_config(place / "student.json", STUDENT)
        options = {"--cache": "cache", "--student-config": "student.json", "--max-steps": 40, "--logging-steps": 1}
        words = [f"{name}={value}" for name, value in {**options, "--num-workers": 2, "--output-dir": "run"}.items()]
        command = f"{SMALL} {sys.executable} -m logitcask.pipeline.cli train {' '.join(words)}"
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", command], cwd=place, capture_output=True, text=True, check=False, timeout=120
        )
        if "unshare failed" in done.stderr or "mount:" in done.stderr:
            lacking("mounting a tmpfs needs root")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert len(losses(place / "run")) == 40
    finally:
        shutil.rmtree(place)
