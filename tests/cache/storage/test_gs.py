"""Caches in Google Cloud Storage: its JSON protocol over HTTP, through gcsfs. Killed, cut off, refused."""

import hashlib
import json
import random
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from logitcask.cache.copy import Copied, copy_cache
from logitcask.cache.errors import IncompleteCacheError, LogitcaskError
from logitcask.cache.integrity import digest
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.cache.storage.open import list_objects
from logitcask.cache.storage.remote import RemoteStore
from logitcask.cache.verify import verify
from tests.support.forked import calling
from tests.support.killed import copy_and_die
from tests.support.runs import losses, train
from tests.support.servers import Wire, gs_environment, gs_server
from tests.support.tiny import folder_bytes, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("gs"), shard_positions=64)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with gs_server(tmp_path_factory.mktemp("server"), "bucket") as port:
        yield port


@pytest.fixture
def url(port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A separate folder in the bucket."""
    reach(port, monkeypatch)
    return f"gs://bucket/{request.node.name}/cache"


def reach(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gs_environment(port).items():
        monkeypatch.setenv(name, value)


def test_a_killed_copy_is_finished_there_and_back(cache: Path, url: str, tmp_path: Path) -> None:
    count, whole = CacheReader(cache).manifest.shards.count, folder_bytes(cache)
    child = calling(copy_and_die, str(cache), url, len(whole) // 2)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(IncompleteCacheError):
        CacheReader(url)
    there = copy_cache(str(cache), url, None)
    assert 0 < there.brought < count
    assert there.brought + there.found == count
    assert there.bytes < sum(map(len, whole.values()))
    assert copy_cache(str(cache), url, None) == Copied(0, count, 0)
    assert verify(url).problems == []
    assert describe(url).bytes == describe(cache).bytes
    copy_cache(url, str(tmp_path / "back"), None)
    assert folder_bytes(tmp_path / "back") == whole


def test_a_student_learns_the_same_from_a_part_over_a_wire_that_is_cut(
    cache: Path, url: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_cache(str(cache), str(tmp_path / "part"), (1, 4))
    near = train(tmp_path / "part", tmp_path / "near", save_steps=3)
    with Wire(port, [20_000, 5_000]) as wire:
        reach(wire.port, monkeypatch)
        copy_cache(str(cache), url, (1, 4))
        assert wire.times_cut == 2
        wire.cuts += [8_000, 4_000]
        far = train(url, tmp_path / "far", save_steps=3, local_copies=tmp_path / "kept")
        assert wire.times_cut == 4
    assert losses(far) == losses(near)


def test_stage_1_writes_to_a_bucket(cache: Path, url: str, tmp_path: Path) -> None:
    make_cache(tmp_path, cache.parent / "teacher", output=url, shard_positions=64)
    copy_cache(url, str(tmp_path / "back"), None)
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)


def test_data_of_any_size_is_written_whole(url: str) -> None:
    """Objects large enough to be sent in parts, and empty ones."""
    big = random.Random(0).randbytes(60 << 20)
    store = RemoteStore(url, read_only=False)
    store.set_all({"big": big, "empty": b""})
    assert digest(store, "big") == hashlib.sha256(big).digest()
    assert digest(store, "empty") == hashlib.sha256(b"").digest()
    assert digest(store, "none") is None


def test_a_bucket_that_is_not_there_is_one_line(cache: Path, url: str) -> None:
    with pytest.raises(LogitcaskError, match=r"^gs://none/cache: cannot be written: .*make the bucket .*first$"):
        copy_cache(str(cache), "gs://none/cache", None)


@pytest.fixture
def answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Paths of the requests to a server that answers all of them alike, as Google does."""
    code, text = request.param
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reach(server.server_port, monkeypatch)
        yield asked
        server.shutdown()


def refusal(code: int) -> tuple[int, str]:
    message = "Anonymous caller does not have storage.objects.list access to the Google Cloud Storage bucket."
    return code, json.dumps({"error": {"code": code, "message": message, "errors": [{"reason": "forbidden"}]}})


@pytest.mark.parametrize("answers", [refusal(401), refusal(403)], indirect=True)
def test_a_refusal_is_one_line_at_once(answers: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        LogitcaskError, match=r"^gs://bucket/cache: refused: [^\n]*Anonymous caller[^\n]*access rights$"
    ):
        list_objects(RemoteStore("gs://bucket/cache", read_only=True), "commits")
    assert len(answers) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("answers", [(416, "Request range not satisfiable")], indirect=True)
def test_an_empty_object_is_no_error(answers: list[str]) -> None:
    """Google refuses a range of an empty object; the emulator does not."""
    store = RemoteStore("gs://bucket/cache", read_only=True)
    assert digest(store, "empty") == hashlib.sha256(b"").digest()
    assert len(answers) == 1
