"""A full disk, a read-only target, a second writer: a one-line error, and nothing committed is lost."""

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import Shard
from logitcask.cache.storage.ownership import sole_writer, watch_folder
from logitcask.cache.storage.staging import scratch_folder, temporary_folder
from logitcask.cache.writer import CacheWriter
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.precompute.sharding import explain_limits, plan_strides
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.support.forked import start
from tests.support.mistakes import said
from tests.support.needed import as_root, lacking
from tests.support.runs import STUDENT, train, write_config
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, precompute_settings, write_jsonl


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that holds part of a cache."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True, check=False)
    if done.returncode:
        lacking("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_line_and_the_same_command_finishes(tmp_path: Path, small_disk: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    settings = precompute_settings(tmp_path, output=small_disk / "cache", shard_positions=32)
    with pytest.raises(LogitcaskError, match="No space left on device; committed shards are kept"):
        precompute(settings)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    precompute(settings)
    want = precompute_settings(tmp_path, output=tmp_path / "want", shard_positions=32)
    precompute(want)
    assert folder_bytes(Path(settings.output)) == folder_bytes(Path(want.output))


@pytest.mark.parametrize(("width", "written"), [(32, "optimizer.pt"), (128, "config.json")])
def test_a_full_disk_in_training_is_one_line_and_the_run_resumes(
    tmp_path: Path, small_disk: Path, width: int, written: str
) -> None:
    """While writing the optimizer's state or the weights: torch and safetensors report it differently."""
    cache, student = make_cache(tmp_path), tmp_path / "student.json"
    write_config(student, {**STUDENT, "hidden_size": width})
    changes = {"student_config": student, "max_steps": 4, "save_steps": 2}
    with pytest.raises(LogitcaskError, match=r"cannot save: .* bytes are free there\): make room, then remove the"):
        train(cache, small_disk / "run", **changes)
    assert (small_disk / "run" / "checkpoint-2" / written).exists()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    train(cache, small_disk / "other", **changes)
    shutil.rmtree(small_disk / "other" / "final")
    (small_disk / "fill").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 2**16))
    with pytest.raises(LogitcaskError, match=r"then resume with --resume-from-checkpoint .*checkpoint-4"):
        train(cache, small_disk / "other", **changes, resume_from_checkpoint="latest")


@pytest.mark.parametrize("folder", [scratch_folder, lambda: temporary_folder("run")], ids=["new", "a run's"])
def test_a_full_disk_of_temporary_files_is_named(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[[], contextlib.AbstractContextManager[Path]]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    said = f"{small_disk}: no space is left there for temporary files: set TMPDIR to a"
    with pytest.raises(LogitcaskError, match=said), folder() as place:
        (place / "file").write_bytes(bytes(1 << 20))
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    with pytest.raises(OSError, match="elsewhere"), folder():
        raise OSError(errno.ENOSPC, "elsewhere")


def test_a_read_only_target_is_one_line(tmp_path: Path, small_disk: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(LogitcaskError, match="cannot write the cache: Read-only file system"):
        precompute(precompute_settings(tmp_path, output=small_disk / "cache"))


@as_root
def test_a_folder_of_somebody_else_is_one_line_and_the_same_command_finishes() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_jsonl(folder / "train.jsonl", RECORDS)
        make_teacher(folder / "teacher")
        settings = precompute_settings(folder, output=folder / "cache", shard_positions=32)
        precompute(settings)
        whole = folder_bytes(Path(settings.output))
        for name in ("commits/c/1/0", "head_ids/c/1/0"):
            (Path(settings.output) / name).unlink()
        with nobody(folder), pytest.raises(LogitcaskError, match="cannot write the cache: Permission denied"):
            precompute(settings)
        assert (Path(settings.output) / "commits/c/0/0").exists()
        precompute(settings)
        assert folder_bytes(Path(settings.output)) == whole


@as_root
@pytest.mark.parametrize(
    ("there", "refused"),
    [
        ([], ".cache.lock"),
        ([".cache.lock"], ".cache.staging"),
        ([".cache.lock", ".cache.staging/ids"], "ids"),
    ],
    ids=["the lock", "the staging folder", "what a killed run of somebody else staged"],
)
@pytest.mark.parametrize("part", [None, "1/2"])
def test_what_cannot_be_made_beside_the_cache_is_named(there: list[str], refused: str, part: str | None) -> None:
    """Even if anybody may open the lock, but create nothing else."""
    if part and len(there) == 2:
        there, refused = [".cache.lock", ".cache.staging/other"], "setup.lock"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_jsonl(folder / "train.jsonl", RECORDS)
        make_teacher(folder / "teacher")
        for name in there:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
            (folder / name).chmod(0o666)
        settings = precompute_settings(folder, output=folder / "cache", shards=part)
        with nobody(folder), pytest.raises(LogitcaskError) as refusal:
            precompute(settings)
        first, _, rest = str(refusal.value).partition(" (")
        assert first == f"{folder}/cache: cannot write the cache: Permission denied"
        assert Path(rest.partition(")")[0]).name == refused
        assert not (folder / "cache").exists()
        precompute(settings)


@contextlib.contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Act as a user who may read there but not write."""
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_target_that_vanishes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    settings = precompute_settings(tmp_path, output=tmp_path / "cache", shard_positions=32)
    write = CacheWriter.write_shard

    def vanishing(writer: CacheWriter, index: int, shard: Shard) -> None:
        if index == 2:
            Path(settings.output).rename(tmp_path / "elsewhere")
        write(writer, index, shard)

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "write_shard", vanishing)
        with pytest.raises(LogitcaskError, match="committed shards are kept"):
            precompute(settings)
    assert not Path(settings.output).exists()
    (tmp_path / "elsewhere").rename(settings.output)
    report = precompute(settings)
    assert report.shards_found == 2
    want = precompute_settings(tmp_path, output=tmp_path / "want", shard_positions=32)
    precompute(want)
    assert folder_bytes(Path(settings.output)) == folder_bytes(Path(want.output))


@pytest.mark.parametrize("bare", [False, True], ids=["is gone", "is another, as the one under an unmounted disk"])
def test_a_runs_folder_that_vanishes_is_one_line_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare: bool
) -> None:
    cache, run = make_cache(tmp_path), tmp_path / "run"
    write_config(tmp_path / "student.json", STUDENT)
    changes = {"student_config": tmp_path / "student.json", "max_steps": 5, "save_steps": 2, "logging_steps": 100}
    step = DistillationTrainer.training_step

    def vanishing(trainer: DistillationTrainer, *given: Any, **named: Any) -> Tensor:
        if trainer.state.global_step == 2:
            run.rename(tmp_path / "elsewhere")
            if bare:
                run.mkdir()
        return step(trainer, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "training_step", vanishing)
        with pytest.raises(
            LogitcaskError, match=r"cannot save: its folder was moved, .*: mount or move the folder back"
        ):
            train(cache, run, **changes)
    assert not list(run.glob("*")), "something was begun in the bare folder"
    (tmp_path / "elsewhere").rename(run)
    train(cache, run, **changes, resume_from_checkpoint="latest")
    train(cache, tmp_path / "whole", **changes)
    assert (run / "final/model.safetensors").read_bytes() == (tmp_path / "whole/final/model.safetensors").read_bytes()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint of a tmpfs whose contents survive unmounting, like those of an unplugged disk."""
    disk, place = tmp_path / "disk", tmp_path / "mount"
    disk.mkdir()
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], capture_output=True, check=False)
    if done.returncode:
        lacking("mounting a tmpfs needs root")
    subprocess.run(["mount", "--bind", disk, place], check=True)
    yield place
    for mounted in (place, disk):
        if mounted.is_mount():
            subprocess.run(["umount", "-l", mounted], check=True)


@pytest.mark.parametrize(
    ("loading", "below"),
    [
        pytest.param(True, True, id="while the teacher is loaded, cache below the mountpoint"),
        pytest.param(False, False, id="between shards, cache at the mountpoint"),
        pytest.param(True, False, id="while the teacher is loaded, at the mountpoint", marks=pytest.mark.nightly),
        pytest.param(False, True, id="between shards, below the mountpoint", marks=pytest.mark.nightly),
    ],
)
def test_a_disk_unmounted_in_the_middle_is_one_line(tmp_path: Path, mount: Path, loading: bool, below: bool) -> None:
    """Nothing is started in the bare folder, nothing is lost."""
    write_jsonl(tmp_path / "train.jsonl", RECORDS * 6)
    make_teacher(tmp_path / "teacher")
    cache = mount / "cache" if below else mount
    settings = precompute_settings(tmp_path, output=cache, shard_positions=64)
    given = settings.model_dump(mode="json", exclude_defaults=True)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    run = start(["precompute-logits", *options], errors=tmp_path / "errors")
    maps = Path(f"/proc/{run.pid}/maps")  # the token table is mapped just before the teacher is loaded
    while not (".staging/tokens" in maps.read_text() if loading else (cache / "commits/c/3/0").exists()):
        assert run.is_alive(), "the run ended before the disk was unmounted"
        time.sleep(0.002)
    subprocess.run(["umount", "-l", mount], check=True)
    run.join(120)
    errors = (tmp_path / "errors").read_text()
    assert run.exitcode == 2, errors
    assert "; committed shards are kept: fix that and run the same command again to finish" in said(errors)
    assert not (mount / "zarr.json").exists()
    assert not (mount / "cache/zarr.json").exists()
    assert not list(mount.rglob("commits/**/0")), "a shard was committed in the bare folder"
    subprocess.run(["mount", "--bind", tmp_path / "disk", mount], check=True)
    report = precompute(settings)
    assert report.shards_found >= (0 if loading else 4)
    assert report.shards_written > 0, "the disk was unmounted too late"
    want = precompute_settings(tmp_path, output=tmp_path / "want", shard_positions=64)
    precompute(want)
    assert folder_bytes(Path(settings.output)) == folder_bytes(Path(want.output))


def test_a_folder_is_watched_before_it_exists(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    check = watch_folder(tmp_path / "parent/cache")
    check()
    (tmp_path / "parent/cache").mkdir()
    check()
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="unmounted"):
        check()
    (tmp_path / "parent/cache").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="unmounted"):
        check()


def test_shards_no_reader_would_take_are_refused() -> None:
    one_line = pytest.raises(LogitcaskError, match=r"tokens: .* less than or equal to .*: lower --shard-positions")
    with one_line, explain_limits():
        plan_strides(np.array([1]), np.array([2**27]), np.array([2**27]))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    settings = precompute_settings(tmp_path)
    with sole_writer(settings.output), pytest.raises(LogitcaskError, match="another run is writing this cache"):
        precompute(settings)
    precompute(settings)
    assert sorted(os.listdir(tmp_path)) == ["cache", "cache.files.json", "teacher", "train.jsonl"]
