"""Local copies of a remote cache: only what this program wrote is read, counted or removed, at no cost per copy."""

import hashlib
import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage import disk_cache
from logitcask.cache.storage.disk_cache import MARK, OWN_FOLDER, DiskCache
from logitcask.cache.storage.remote import RemoteStore

KEEP = "not a copy"


def objects(count: int, size: int, seed: int = 0) -> dict[bytes, bytes]:
    """Return objects of ``size`` bytes by digest."""
    made = [random.Random(seed + i).randbytes(size) for i in range(count)]
    return {hashlib.sha256(data).digest(): data for data in made}


def held(cache: DiskCache) -> dict[str, int]:
    """Return the sizes of the objects, by name."""
    return {file.name: file.stat().st_size for file in cache.folder.iterdir() if file.name != MARK}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the user's, with old files of all kinds, inside and beside what an earlier run kept."""
    place, digest = tmp_path / "home", "ab" * 32
    earlier = DiskCache(place, 10_000)
    for key, data in objects(2, 100, seed=50).items():
        earlier.put(key, data)
    (tmp_path / "outside").mkdir()
    for name in ("thesis.tex", digest, f"{digest}.{'0' * 32}.partial", f"{OWN_FOLDER}/thesis.tex"):
        (place / name).write_text(KEEP)
    (place / OWN_FOLDER / digest).mkdir()
    (place / OWN_FOLDER / digest / "deep").write_text(KEEP)
    (tmp_path / "outside/file").write_text(KEEP)
    (place / OWN_FOLDER / ("cd" * 32)).symlink_to(tmp_path / "outside/file")
    (place / OWN_FOLDER / ("ef" * 32)).symlink_to(tmp_path / "outside")
    for path in [*place.rglob("*"), tmp_path / "outside/file"]:
        os.utime(path, (1, 1), follow_symlinks=False)
    return place


def test_files_of_the_user_are_never_touched(home: Path) -> None:
    """Although they are older than every copy, and some have the names of copies."""
    cache = DiskCache(home, 1_000)
    before = {path: path.lstat() for path in sorted(home.rglob("*"))}
    copies = {name for name, size in held(cache).items() if size == 100}
    assert len(copies) == 2
    for key, data in objects(40, 100).items():
        cache.put(key, data)
        assert cache.get(key, 100) == data
    for path, status in before.items():
        if path.name in copies:
            assert not path.exists(), "the oldest copies are dropped"
        elif not stat.S_ISDIR(status.st_mode):
            now = path.lstat()
            assert (now.st_ino, now.st_size, now.st_mtime_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)
    assert (home / OWN_FOLDER / ("ab" * 32) / "deep").read_text() == KEEP
    assert (home.parent / "outside/file").read_text() == KEEP
    for name in ("ab", "cd", "ef"):
        assert cache.get(bytes.fromhex(name * 32), 100) is None
    assert (home.parent / "outside/file").stat().st_mtime == 1


def test_the_folder_is_marked_for_backups(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000)
    for key, data in objects(1, 10).items():
        cache.put(key, data)
    assert os.listdir(tmp_path) == [OWN_FOLDER]
    assert (cache.folder / MARK).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


@pytest.mark.parametrize("made", ["folder with files", "link", "dangling link", "file"])
def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path: Path, made: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "home").mkdir()
    place = tmp_path / "home" / OWN_FOLDER
    if made == "folder with files":
        place.mkdir()
        (place / ("ab" * 32)).write_text(KEEP)
    elif made == "file":
        place.write_text(KEEP)
    else:
        place.symlink_to(tmp_path / ("other" if made == "link" else "none"))
    cache = DiskCache(tmp_path / "home", 50)
    assert cache.is_foreign()
    for key, data in objects(3, 40).items():
        cache.put(key, data)
    assert os.listdir(tmp_path / "other") == []
    assert not (tmp_path / "none").exists()
    if made == "folder with files":
        assert os.listdir(place) == ["ab" * 32]
    with pytest.raises(LogitcaskError, match="must be a folder that logitcask made: rename it or choose another"):
        RemoteStore("s3://bucket/cache", read_only=True, disk_cache=cache)


def test_the_least_recently_used_are_dropped_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_600)
    made = objects(20, 100)
    for age, (key, data) in enumerate(list(made.items())[:16]):
        cache.put(key, data)
        os.utime(cache.folder / key.hex(), (age + 1, age + 1))
    first, *rest = made
    assert cache.get(first, 100) == made[first]
    cache.put(rest[15], made[rest[15]])
    assert set(held(cache)) == {key.hex() for key in (first, *rest[2:15], rest[15])}


def test_the_limit_holds_while_threads_add(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    (tmp_path / OWN_FOLDER).mkdir()
    (tmp_path / OWN_FOLDER / MARK).touch()
    (tmp_path / OWN_FOLDER / f"{'a' * 64}.{'b' * 32}.partial").write_bytes(bytes(5_000))  # of a killed process
    for seed in range(3):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: cache.put(*item), objects(60, 300, seed=seed * 60).items()))
        assert 8_000 <= sum(held(cache).values()) <= 10_000


def test_two_processes_exceed_the_limit_by_a_sixteenth_at_most(tmp_path: Path) -> None:
    """Each counts only what it added itself."""
    one, other = DiskCache(tmp_path, 16_000), DiskCache(tmp_path, 16_000)
    most = 0
    for index, (key, data) in enumerate(objects(600, 100).items()):
        (one, other)[index % 2].put(key, data)
        most = max(most, sum(held(one).values()))
    assert 15_000 <= most <= 17_000


def test_the_folder_is_listed_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, once per copy: 0.44 s each with 60,000 copies there."""
    times, measure = [0], disk_cache._objects

    def counted(folder: Path) -> list[tuple[int, int, str]]:
        times[0] += 1
        return measure(folder)

    monkeypatch.setattr(disk_cache, "_objects", counted)
    cache = DiskCache(tmp_path, 100_000)
    for key, data in objects(3_000, 100).items():
        cache.put(key, data)
    assert 90_000 <= sum(held(cache).values()) <= 100_000
    assert 1 <= times[0] <= 3_000 * 100 * 16 // 100_000 + 1
