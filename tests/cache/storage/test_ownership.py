"""Ownership of a cache where there are no file locks: S3, Google Cloud Storage and SFTP, each on a local server."""

import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage import ownership
from logitcask.cache.storage.open import list_objects
from logitcask.cache.storage.ownership import Part, sole_writer
from logitcask.cache.storage.remote import RemoteStore, filesystem
from logitcask.pipeline.precompute.precompute import precompute
from tests.support.forked import calling, forks
from tests.support.killed import QUICK, hold
from tests.support.servers import gs_environment, gs_server, s3_environment, s3_server, ssh_server
from tests.support.tiny import folder_bytes, make_cache, precompute_settings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in QUICK.items():
        monkeypatch.setattr(ownership, name, seconds)


@pytest.fixture(params=["s3", "gs", "ssh"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a cache to write."""
    if request.param == "ssh":
        with ssh_server(tmp_path) as server:
            monkeypatch.setenv("HOME", str(server.home))
            (tmp_path / "far").mkdir()
            yield server.url(tmp_path / "far" / "cache")
    elif request.param == "gs":
        with gs_server(tmp_path, "bucket") as port:
            for name, value in gs_environment(port).items():
                monkeypatch.setenv(name, value)
            yield "gs://bucket/caches/cache"
    else:
        with s3_server(tmp_path) as port:
            for name, value in s3_environment(port).items():
                monkeypatch.setenv(name, value)
            filesystem("s3://bucket/x")[0].mkdir("bucket")
            yield "s3://bucket/caches/cache"


def beside(url: str) -> set[str]:
    """Return the names of the objects beside the cache."""
    names = list_objects(RemoteStore(url.rpartition("/")[0], read_only=True), "")
    return {name for name in names if not name.startswith("cache/") and not name.endswith(".partial")}


def another(url: str) -> BaseProcess:
    """Start another process that writes the cache until it is killed."""
    started = forks().Event()
    process = calling(hold, url, started)
    process.start()
    assert started.wait(120)
    return process


def test_a_second_run_is_refused_and_a_killed_one_is_succeeded(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_cache(tmp_path)
    settings = precompute_settings(tmp_path, output=url)
    first = another(url)
    with pytest.raises(LogitcaskError, match=f"^{url}: another run is writing this cache: wait for it or stop it$"):
        precompute(settings)
    assert len(beside(url)) == 1
    first.kill()
    first.join()
    assert len(beside(url)) == 1
    capfd.readouterr()
    precompute(settings)
    notice = (
        f"{url}: another run has started to write this cache; if it shows no sign of life for 12 s, this run continues"
    )
    assert notice in capfd.readouterr().err
    assert beside(url) == set()
    copy_cache(url, str(tmp_path / "back"), None)
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "cache")


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_parts_are_written_side_by_side(url: str) -> None:
    for first, second in (((1, 2), (2, 2)), ((1, 12), (2, 12))):
        with sole_writer(url, first), sole_writer(url, second):
            assert len(beside(url)) == 2
    refused: list[tuple[Part | None, Part | None]] = [
        ((1, 2), (1, 2)),
        ((1, 2), (2, 12)),
        ((1, 2), None),
        (None, (1, 2)),
    ]
    for one, other in refused:
        with sole_writer(url, one):
            with pytest.raises(LogitcaskError, match="another run is writing"), sole_writer(url, other):
                pass
            assert len(beside(url)) == 1
    assert beside(url) == set()


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_other_caches_in_the_same_folder_do_not_conflict(url: str) -> None:
    with sole_writer(f"{url}-2"), sole_writer(url.removesuffix("he")), sole_writer(url):
        assert len(beside(url)) == 3


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_of_two_runs_that_start_at_once_at_most_one_continues(url: str) -> None:
    together, owners, refused = threading.Barrier(2), [], threading.Event()

    def run() -> None:
        together.wait()
        try:
            with sole_writer(url):
                owners.append(threading.get_ident())
                refused.wait(30)
        except LogitcaskError:
            refused.set()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) <= 1
    assert refused.is_set()
    assert beside(url) == set()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path) as port:
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LogitcaskError, match=r"^s3://none/caches: .*bucket"), sole_writer("s3://none/caches/cache"):
            pass
