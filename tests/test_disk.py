"""The machine refuses: a full disk, a read-only target, a second writer. One line, nothing committed is lost."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.errors import LogitcaskError
from cache.lock import sole_writer
from cache.shard import Shard
from cache.writer import CacheWriter
from pipeline.precompute import explain_limits, precompute
from pipeline.shards import plan_strides
from tests.tiny import RECORDS, folder_bytes, make_teacher, precompute_settings, write_jsonl


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that holds part of a cache."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", place], check=True)


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


def test_a_read_only_target_is_one_line(tmp_path: Path, small_disk: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(LogitcaskError, match="cannot write the cache: Read-only file system"):
        precompute(precompute_settings(tmp_path, output=small_disk / "cache"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write")
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


@contextlib.contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Be a user who may read there and not write."""
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


def test_shards_no_reader_would_take_are_refused() -> None:
    one_line = pytest.raises(LogitcaskError, match=r"tokens .* less than or equal to .*: lower --shard-positions")
    with one_line, explain_limits():
        plan_strides(np.array([1]), np.array([2**27]), np.array([2**27]))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    settings = precompute_settings(tmp_path)
    with sole_writer(settings.output), pytest.raises(LogitcaskError, match="another run is writing this cache"):
        precompute(settings)
    precompute(settings)
    assert sorted(os.listdir(tmp_path)) == ["cache", "teacher", "train.jsonl"]
