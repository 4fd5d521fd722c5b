"""Copying a cache: folders, .zip files, S3's protocol over HTTP, OpenSSH. Killed, cut off or damaged, then finished."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from zarr.core.buffer import Buffer
from zarr.core.sync import sync
from zarr.storage import LocalStore

from logitcask.cache.copy import Copied, copy_cache
from logitcask.cache.errors import CacheFormatError, CacheMismatchError, IncompleteCacheError, LogitcaskError
from logitcask.cache.integrity import commit_key, digest
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.cache.storage import remote
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.cache.verify import repair, verify
from logitcask.pipeline.mistakes import error_lines
from tests.support.forked import calling
from tests.support.killed import copy_and_die, copy_and_die_packing
from tests.support.malformed import attempt
from tests.support.needed import lacking
from tests.support.runs import history, train
from tests.support.servers import SshServer, Wire, s3_environment, s3_server, ssh_server
from tests.support.tiny import folder_bytes, make_cache

KILLS = 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of at least five shards."""
    return make_cache(tmp_path_factory.mktemp("copy"), shard_positions=64)


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        with pytest.MonkeyPatch.context() as patch:
            set_s3(patch, port)
            remote.filesystem("s3://bucket/x")[0].mkdir("bucket")
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    set_s3(monkeypatch, s3_port)
    return f"s3://bucket/{request.node.name}"


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    with ssh_server(tmp_path) as server:
        monkeypatch.setenv("HOME", str(server.home))
        yield server


@pytest.fixture(params=["folder", "zip", "s3", "ssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A destination for a copy."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/cache"
    if request.param == "ssh":
        server: SshServer = request.getfixturevalue("ssh")
        return server.url(tmp_path / "far" / "cache")
    return str(tmp_path / ("cache.zip" if request.param == "zip" else "copy/cache"))


def set_s3(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    for name, value in s3_environment(port).items():
        monkeypatch.setenv(name, value)


def copy(source: str | Path, destination: str | Path, shards: tuple[int, int] | None = None) -> Copied:
    return copy_cache(str(source), str(destination), shards)


def test_there_and_back_is_the_same_cache(cache: Path, place: str, tmp_path: Path) -> None:
    count = CacheReader(cache).manifest.shards.count
    there = copy(cache, place)
    assert (there.brought, there.found) == (count, 0)
    assert there.bytes == sum(len(data) for data in folder_bytes(cache).values())
    assert copy(cache, place) == Copied(0, count, 0)
    assert verify(place).problems == []
    assert describe(place).bytes == describe(cache).bytes
    copy(place, tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)
    assert not list(tmp_path.glob(".*"))


def test_a_part_is_a_separate_cache(cache: Path, place: str, tmp_path: Path) -> None:
    copy(cache, place, (1, 4))
    whole, part = CacheReader(cache), CacheReader(place)
    assert verify(place).problems == []
    first = int(whole.shard_starts[1])
    assert len(part) == int(whole.shard_starts[4]) - first
    for index in range(len(part)):
        example, want = part.example(index), whole.example(first + index)
        np.testing.assert_array_equal(example.input_ids, want.input_ids)
        np.testing.assert_array_equal(example.targets.tail_ids, want.targets.tail_ids)
    assert part.manifest.part is not None
    assert (part.manifest.part.first, part.manifest.part.of) == (1, whole.manifest.shards.count)
    copy(place, tmp_path / "smaller", (1, 2))
    smallest = CacheReader(tmp_path / "smaller").manifest.part
    assert smallest is not None
    assert (smallest.first, smallest.of) == (2, whole.manifest.shards.count)


def test_a_student_learns_from_a_part(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "part", (0, 2))
    run = train(tmp_path / "part", tmp_path / "run", save_steps=3)
    assert len(history(run)) == 3


def test_a_killed_copy_is_finished_by_the_same_command(cache: Path, place: str, tmp_path: Path) -> None:
    objects = len(folder_bytes(cache))
    chance = random.Random(place)
    for _ in range(KILLS // 4):
        child = calling(copy_and_die, str(cache), place, chance.randrange(objects // 3))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if not place.endswith(".zip"):
            with pytest.raises((IncompleteCacheError, CacheFormatError)):
                CacheReader(place)
    copy(cache, place)
    copy(place, tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)
    assert not list(tmp_path.glob(".*"))
    if place == str(tmp_path / "copy/cache"):
        assert folder_bytes(Path(place)) == folder_bytes(cache)


@pytest.mark.parametrize("moment", ["among the objects", "before it is renamed", "after it was renamed"])
def test_a_copy_killed_while_it_packs_a_zip_is_finished(cache: Path, moment: str, tmp_path: Path) -> None:
    place, objects = tmp_path / "cache.zip", len(folder_bytes(cache))
    steps = {"among the objects": objects // 2, "before it is renamed": objects, "after it was renamed": objects + 1}
    child = calling(copy_and_die_packing, str(cache), str(place), steps[moment])
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert place.exists() == (moment == "after it was renamed")
    copy(cache, place)
    assert not list(tmp_path.glob(".*"))
    copy(place, tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)


def test_a_cut_connection_is_made_again(
    cache: Path, s3: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wire(s3_port, [20_000, 5_000, 30_000]) as wire:
        set_s3(monkeypatch, wire.port)
        copy(cache, f"{s3}/cache")
        copy(f"{s3}/cache", tmp_path / "back")
        assert wire.times_cut == 3
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)


def test_a_cut_ssh_connection_is_made_again(cache: Path, ssh: SshServer, tmp_path: Path) -> None:
    with Wire(ssh.port, [20_000, 5_000, 30_000]) as wire:
        ssh.know(wire.port)
        copy(cache, ssh.url(tmp_path / "far", wire.port))
        copy(ssh.url(tmp_path / "far", wire.port), tmp_path / "back")
        assert wire.times_cut == 3
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "far") == folder_bytes(cache)


def test_a_connection_that_stays_down_is_reported_and_the_copy_resumes_later(
    cache: Path, s3: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(cache, f"{s3}/cache")
    monkeypatch.setattr(remote, "TRIES", 2)
    with Wire(s3_port, [60_000], down_after=True) as wire:
        set_s3(monkeypatch, wire.port)
        with pytest.raises(LogitcaskError, match=r"no connection after 2 tries: .*run the same command again"):
            copy(f"{s3}/cache", tmp_path / "back")
    set_s3(monkeypatch, s3_port)
    assert copy(f"{s3}/cache", tmp_path / "back").bytes < sum(map(len, folder_bytes(cache).values()))
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)


def test_an_unknown_host_key_is_refused(ssh: SshServer, tmp_path: Path) -> None:
    (ssh.home / ".ssh/known_hosts").unlink()
    with pytest.raises(LogitcaskError, match="refused: HostKeyNotVerifiable"):
        copy(ssh.url(tmp_path / "far"), tmp_path / "back")


def test_rsync_and_cp_carry_a_cache(cache: Path, ssh: SshServer, tmp_path: Path) -> None:
    if shutil.which("rsync") is None:
        lacking("no rsync here: apt-get install openssh-server rsync")
    far = f"{ssh.url(tmp_path).split('//')[1].split('@')[0]}@127.0.0.1:{tmp_path}/far/"
    subprocess.run(["rsync", "-a", "-e", ssh.command(), f"{cache}/", far], check=True)
    subprocess.run(["cp", "-r", str(tmp_path / "far"), str(tmp_path / "again")], check=True)
    assert verify(tmp_path / "again").problems == []
    assert copy(cache, tmp_path / "again").bytes == 0


def test_damage_at_the_source_is_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "source")
    flip(tmp_path / "source/tail_ids/c/2/0")
    with pytest.raises(CacheFormatError, match="tail_ids/c/2/0: bytes differ"):
        copy(tmp_path / "source", tmp_path / "copy")
    with pytest.raises(IncompleteCacheError):
        CacheReader(tmp_path / "copy")
    assert copy(cache, tmp_path / "copy").found == 2


def test_bytes_that_are_written_wrong_are_found(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LocalStore.set

    async def spoil(self: LocalStore, key: str, value: Buffer) -> None:
        await put(self, key, value[:-1] if key == "head_ids/c/1/0" else value)

    monkeypatch.setattr(LocalStore, "set", spoil)
    with pytest.raises(CacheFormatError, match="head_ids/c/1/0: bytes differ after they were written"):
        copy(cache, tmp_path / "copy")
    with pytest.raises(IncompleteCacheError):
        CacheReader(tmp_path / "copy")


def test_damage_at_the_destination_is_repaired(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    copy(cache, place)
    flip(place / "head_ids/c/1/0")
    flip(place / "tokenizer/tokenizer.json/c/0")
    repaired = copy(cache, place)
    assert (repaired.brought, repaired.found) == (1, CacheReader(cache).manifest.shards.count - 1)
    assert folder_bytes(place) == folder_bytes(cache)


def test_a_damaged_zip_is_refused(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "a.zip")
    good = (tmp_path / "a.zip").read_bytes()
    for at in range(100, len(good), len(good) // 60):
        (tmp_path / "a.zip").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        try:
            problems = verify(tmp_path / "a.zip").problems
            copy(tmp_path / "a.zip", tmp_path / "back")
        except LogitcaskError:
            continue
        assert not problems
        assert folder_bytes(tmp_path / "back") == folder_bytes(cache)
    (tmp_path / "a.zip").write_bytes(good[: len(good) // 2])
    with pytest.raises(CacheFormatError, match=r"not a readable \.zip file"):
        CacheReader(tmp_path / "a.zip")


def test_equal_caches_make_equal_zips(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "a.zip")
    shutil.copytree(cache, tmp_path / "again")
    copy(tmp_path / "again", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_what_lies_at_the_destination_is_never_overwritten(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path, output=tmp_path / "other", seed=1)
    before = folder_bytes(other)
    with pytest.raises(CacheMismatchError, match=r"holds another cache: .*seed"):
        copy(cache, other)
    assert folder_bytes(other) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(CacheFormatError, match="not a logit cache"):
        copy(cache, tmp_path / "notes")
    assert folder_bytes(tmp_path / "notes") == {"a.txt": b"mine"}


def test_an_unfinished_cache_gives_only_its_parts(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "source")
    (tmp_path / "source" / commit_key(3)).unlink()
    with pytest.raises(IncompleteCacheError, match=r"1 of the shards 0:\d+ are not committed, the first is 3"):
        copy(tmp_path / "source", tmp_path / "copy")
    assert copy(tmp_path / "source", tmp_path / "copy", (0, 3)).brought == 3


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("ftp://host/cache", r"ftp:// is not supported: give a folder, a \.zip file or s3://"),
        ("s3:///cache", "names no bucket"),
        ("s3://bucket/cache.zip", "must be on this machine"),
        ("nowhere", "no such cache"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(source: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match=rule):
        copy(source, tmp_path / "copy")


@pytest.mark.parametrize("shards", [(0, 99), (3, 3), (4, 2)])
def test_shards_that_are_not_there_are_one_line(cache: Path, shards: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match=rf"--shards {shards[0]}:{shards[1]}: must be FIRST:STOP within 0:"):
        copy(cache, tmp_path / "copy", shards)


def test_only_a_folder_can_be_repaired(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "a.zip")
    with pytest.raises(LogitcaskError, match="only a cache in a folder can be repaired"):
        repair(tmp_path / "a.zip", verify(tmp_path / "a.zip"))


def test_a_student_learns_the_same_from_afar(
    cache: Path, s3: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a connection that is cut; then, with local copies of everything, from a cache that lost its shards."""
    copy(cache, f"{s3}/cache")
    near = train(cache, tmp_path / "near", max_steps=6, save_steps=6)
    with Wire(s3_port, [40_000, 20_000]) as wire:
        set_s3(monkeypatch, wire.port)
        settings = {"local_copies": tmp_path / "kept", "max_steps": 6, "save_steps": 6}
        far = train(f"{s3}/cache", tmp_path / "far", **settings)
        assert wire.times_cut == 2
    assert losses(far) == losses(near)
    set_s3(monkeypatch, s3_port)
    store = remote.RemoteStore(f"{s3}/cache", read_only=False)
    for key in folder_bytes(cache):
        if key.startswith("tail_ids/c/"):
            sync(store.delete(key))
    again = train(f"{s3}/cache", tmp_path / "again", **settings)
    assert losses(again) == losses(near)


def losses(run: Path) -> list[float]:
    return [line["total_loss"] for line in history(run)]


def test_local_copies_are_bounded_and_never_trusted(cache: Path, s3: str, tmp_path: Path) -> None:
    copy(cache, f"{s3}/cache")
    sizes = [len(data) for key, data in folder_bytes(cache).items() if "/c/" in key and key[0] in "hit"]
    limit = max(sizes) + min(sizes)
    assert sum(sizes) > 2 * limit, "something must be dropped"
    disk_cache = DiskCache(tmp_path / "kept", limit)
    reader, near = CacheReader(f"{s3}/cache", disk_cache=disk_cache), CacheReader(cache)
    for _ in range(2):
        for index in range(len(near)):
            np.testing.assert_array_equal(reader.example(index).targets.tail_ids, near.example(index).targets.tail_ids)
            assert sum(file.stat().st_size for file in disk_cache.folder.glob("?" * 64)) <= limit
        for file in disk_cache.folder.glob("?" * 64):
            flip(file)


def test_a_folder_for_local_copies_that_cannot_be_written_is_no_error(cache: Path, s3: str, tmp_path: Path) -> None:
    copy(cache, f"{s3}/cache")
    (tmp_path / "file").write_text("no folder")
    reader = CacheReader(f"{s3}/cache", disk_cache=DiskCache(tmp_path / "file", 10**9))
    assert len(reader.shard(0)) > 0


def test_data_of_any_size_is_written_whole(s3: str, ssh: SshServer, tmp_path: Path) -> None:
    """Objects larger than the servers' part sizes, and empty ones."""
    big = random.Random(0).randbytes(60 << 20)
    for url in (s3, ssh.url(tmp_path / "far")):
        store = remote.RemoteStore(url, read_only=False)
        store.set_all({"big": big, "empty": b""})
        assert digest(store, "big") == hashlib.sha256(big).digest()
        assert digest(store, "empty") == hashlib.sha256(b"").digest()
        assert digest(store, "none") is None


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_command_reports_what_it_did(cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "logitcask", "cache", "copy", str(cache), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{CacheReader(cache).manifest.shards.count} shards copied, 0 already present" in done.stdout
    message = error_lines("--shards: must be FIRST:STOP, such as 0:10, got '1-3'", "logitcask cache copy")
    assert attempt([*command[3:], "--shards", "1-3"]) == (2, message)
