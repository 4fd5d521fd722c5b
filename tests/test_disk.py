"""The machine refuses: a full disk, a read-only target, a second writer. One line, nothing committed is lost."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.errors import LogitcaskError
from cache.lock import sole_writer
from pipeline.precompute import precompute
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
    assert folder_bytes(settings.output) == folder_bytes(want.output)


def test_a_read_only_target_is_one_line(tmp_path: Path, small_disk: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(LogitcaskError, match="cannot write the cache: Read-only file system"):
        precompute(precompute_settings(tmp_path, output=small_disk / "cache"))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    make_teacher(tmp_path / "teacher")
    settings = precompute_settings(tmp_path)
    with sole_writer(settings.output), pytest.raises(LogitcaskError, match="another run is writing this cache"):
        precompute(settings)
    precompute(settings)
    assert sorted(os.listdir(tmp_path)) == ["cache", "teacher", "train.jsonl"]
