"""Lock files of a cache in a folder: on NFS's rule, on a volume, beside and inside, and where a system has none."""

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.cache.storage import ownership
from logitcask.cache.storage.ownership import Part, sole_writer
from logitcask.cache.storage.staging import lock_file
from logitcask.cache.verify import repair, verify
from logitcask.cache.writer import create_cache
from logitcask.pipeline.generate_data.journal import Journal
from logitcask.pipeline.precompute.precompute import precompute
from tests.cache.storage.test_disk import nobody
from tests.cache.test_cache import FILES, label_settings, manifest_of
from tests.support.needed import as_root, lacking
from tests.support.tiny import RECORDS, folder_bytes, make_cache, precompute_settings, sound_shards

FLOCK = fcntl.flock


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files locked under NFS's rule: shared needs a readable descriptor, exclusive a writable one."""
    names: list[str] = []

    def flock(file: IO[Any], operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        needed = os.O_RDONLY if operation & fcntl.LOCK_SH else os.O_WRONLY
        if mode not in (needed, os.O_RDWR):
            raise OSError(9, "Bad file descriptor")
        names.append(Path(str(file.name)).name if isinstance(file.name, str) else "journal")
        FLOCK(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    return names


def test_every_lock_can_be_shared_and_exclusive_on_nfs(tmp_path: Path, taken: list[str]) -> None:
    cache = tmp_path / "cache"
    with sole_writer(cache, (1, 2)), sole_writer(cache, (2, 2)):
        with pytest.raises(LogitcaskError, match="another run is writing part 1/2"), sole_writer(cache, (1, 2)):
            pass
        with pytest.raises(LogitcaskError, match="use the same number of parts"), sole_writer(cache, (1, 3)):
            pass
        with pytest.raises(LogitcaskError, match="another run is writing this cache"), sole_writer(cache):
            pass
    with sole_writer(cache), Journal(tmp_path / "answers.jsonl"):
        pass
    assert set(taken) == {".cache.lock", "setup.lock", "1-of-2.lock", "2-of-2.lock", "journal"}
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl"]


def test_the_rule_refuses_what_was_done_before(tmp_path: Path, taken: list[str]) -> None:
    """So that the test above can fail."""
    for mode, shared in (("w", True), ("r", False)):
        (tmp_path / "lock").touch()
        with (tmp_path / "lock").open(mode) as file, pytest.raises(OSError, match="Bad file descriptor"):
            lock_file(file, shared=shared)
    assert taken == []


def test_a_cache_is_read_and_not_written_where_a_system_has_no_locks(tmp_path: Path) -> None:
    """As on Windows: the module is missing."""
    cache = make_cache(tmp_path)
    program = """if True:
        import sys
        sys.modules["fcntl"] = None
        from logitcask.cache.copy import copy_cache
        from logitcask.cache.errors import LogitcaskError
        from logitcask.cache.reader import CacheReader
        from logitcask.cache.verify import verify
        from logitcask.pipeline.generate_data.journal import Journal
        assert len(CacheReader(sys.argv[1]).shard(0)) > 0 and not verify(sys.argv[1]).problems
        for write in (lambda: copy_cache(sys.argv[1], sys.argv[2], None), lambda: Journal(sys.argv[2])):
            try:
                write()
            except LogitcaskError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, cache, tmp_path / "new"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "writing needs file locks, which this system lacks: use Linux or macOS\n" * 2


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A mounted volume of a file system that makes lost+found, empty but for that."""
    place = tmp_path / "volume"
    (place / "lost+found").mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True, check=False)
    if done.returncode:
        lacking("mounting a tmpfs needs root")
    (place / "lost+found").mkdir()
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("part", [None, (1, 1)])
def test_a_volume_is_a_cache(volume: Path, part: Part | None) -> None:
    """Its lock and staging files are inside, are not part of the cache, and are gone afterwards."""
    folder = volume.parent
    want = make_cache(folder, output=folder / "want")
    settings = precompute_settings(folder, output=volume, shards="1/1" if part else None)
    with sole_writer(volume, part) as staging:
        assert staging.is_relative_to(volume)
        assert {path.name for path in folder.iterdir()} == {
            "teacher",
            "train.jsonl",
            "want",
            "want.files.json",
            "volume",
        }
        with pytest.raises(LogitcaskError, match="another run is writing"), sole_writer(volume, part):
            pass
    precompute(settings)
    assert folder_bytes(volume) == folder_bytes(want)
    assert set(os.listdir(volume)) == {*os.listdir(want), "lost+found"}
    with sole_writer(volume) as staging:
        (staging / "ids").write_bytes(b"x" * 10)
        assert describe(volume).bytes == describe(want).bytes
        assert verify(volume).problems == []
    precompute(precompute_settings(folder, output=volume, overwrite=True))
    assert folder_bytes(volume) == folder_bytes(want)
    assert (volume / "lost+found").is_dir()


@as_root
def test_a_folder_of_ones_own_in_a_folder_of_somebody_else_is_written() -> None:
    """Stage 1, copy and repair, by a user who can write nothing beside it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        want = make_cache(folder, output=folder / "want", shard_positions=32)
        for name in ("cache", "copy"):
            (folder / name).mkdir()
            os.chown(folder / name, 65534, 65534)
        settings = precompute_settings(folder, output=folder / "cache", shard_positions=32)
        with nobody(folder):
            precompute(settings)
            copy_cache(str(folder / "cache"), str(folder / "copy"), None)
            (folder / "copy/tail_ids/c/1/0").write_bytes(b"x")
            assert repair(folder / "copy", verify(folder / "copy")) == [1]
            copy_cache(str(folder / "cache"), str(folder / "copy"), None)
        for name in ("cache", "copy"):
            assert folder_bytes(folder / name) == folder_bytes(want)
            assert set(os.listdir(folder / name)) == set(os.listdir(want))


@as_root
@pytest.mark.parametrize("first_is_root", [True, False])
def test_who_locks_inside_and_who_locks_beside_exclude_each_other(first_is_root: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "cache").mkdir()
        os.chown(folder / "cache", 65534, 65534)
        refused = pytest.raises(LogitcaskError, match="another run is writing this cache")
        if first_is_root:
            with sole_writer(folder / "cache") as staging, nobody(folder):
                assert staging.parent == folder
                with refused, sole_writer(folder / "cache"):
                    pass
        else:
            with nobody(folder):
                owned = sole_writer(folder / "cache")
                assert owned.__enter__().parent == folder / "cache"
            with refused, sole_writer(folder / "cache"):
                pass
            owned.__exit__(None, None, None)
        with sole_writer(folder / "cache"):
            pass
        assert os.listdir(folder / "cache") == []
        assert os.listdir(folder) == ["cache"]


def test_two_names_of_one_folder_are_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(tmp_path / "cache")
    monkeypatch.chdir(tmp_path / "cache")
    for name in (".", tmp_path / "elsewhere/link", "../cache/"):
        with sole_writer(tmp_path / "cache"), pytest.raises(LogitcaskError, match="another run"), sole_writer(name):
            pass
    assert os.listdir(tmp_path / "cache") == []


def test_the_working_directory_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = make_cache(tmp_path, output=tmp_path / "want")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    precompute(precompute_settings(tmp_path, output="."))
    assert folder_bytes(tmp_path / "here") == folder_bytes(want)
    assert len(CacheReader(".")) == len(RECORDS)
    assert sorted(os.listdir(tmp_path)) == [
        "here",
        "here.files.json",
        "teacher",
        "train.jsonl",
        "want",
        "want.files.json",
    ]


def test_what_another_machine_removes_while_it_is_created_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines begin a cache in a network folder without locks: one takes for left what the other writes."""
    monkeypatch.setattr(ownership, "setting_up", lambda _: contextlib.nullcontext())
    label = label_settings(300, 2, 0, 1)
    manifest, examples = manifest_of(label, sound_shards(label, [1, 1]))
    place, replace, others = tmp_path / "cache", Path.replace, list[list[int]]()

    def meanwhile(self: Path, target: Path) -> Path:
        if not others and self.parent.name == "head_ids":
            others.append([])
            others[0] += create_cache(place, manifest, examples, FILES, shards={1}).missing_shards()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    assert create_cache(place, manifest, examples, FILES, shards={0}).missing_shards() == [0]
    assert others == [[1]]
    create_cache(tmp_path / "alone", manifest, examples, FILES)
    assert folder_bytes(place) == folder_bytes(tmp_path / "alone")
