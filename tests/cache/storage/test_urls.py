"""URLs keep every character that a store keeps, on local servers; what stores and tools read differently is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.open import is_empty, object_sizes, open_store, write_objects
from logitcask.cache.storage.ownership import sole_writer
from logitcask.cache.storage.remote import filesystem, split_url
from tests.support.servers import SshServer, gs_environment, gs_server, s3_environment, s3_server, ssh_server
from tests.support.tiny import folder_bytes, make_cache

KEPT = ["exp#2", "exp?a=1", "a%20b", "a%23b", "a b ", "é+&=@:,", "[x]*", "deep/er#/c", "commits"]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with ssh_server(tmp_path_factory.mktemp("ssh")) as server:
        yield server


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    folder = tmp_path_factory.mktemp("servers")
    with s3_server(folder) as s3, gs_server(folder, "bucket") as gs:
        yield {"s3": s3, "gs": gs}


@pytest.fixture(params=["s3", "gs", "ssh"])
def base(
    request: pytest.FixtureRequest,
    ssh: SshServer,
    ports: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The URL of an empty place."""
    if request.param == "ssh":
        monkeypatch.setenv("HOME", str(ssh.home))
        return ssh.url(tmp_path / "far")
    environment = {"s3": s3_environment, "gs": gs_environment}[request.param](ports[request.param])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if request.param == "s3" and not filesystem("s3://bucket/x")[0].exists("bucket"):
        filesystem("s3://bucket/x")[0].mkdir("bucket")
    return f"{request.param}://bucket/{tmp_path.name}"


def stored(base: str, tmp_path: Path) -> set[str]:
    """Return the paths of all objects below the base, as the store itself names them."""
    if base.startswith("ssh"):
        return set(folder_bytes(tmp_path / "far"))
    fs, root = filesystem(base)
    return {str(name).removeprefix(f"{root}/") for name in fs.find(root)}


def test_every_name_is_a_place_of_its_own(base: str, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name in ["exp", "a", *KEPT]:
        write_objects(open_store(f"{base}/{name}", read_only=False), {"zarr.json": name.encode(), "c/0": b"x"})
    ssh = base.startswith("ssh")
    keys = {{"a%20b": "a b", "a%23b": "a#b"}.get(name, name) if ssh else name for name in ["exp", "a", *KEPT]}
    assert stored(base, tmp_path) == {f"{key}/{part}" for key in keys for part in ("zarr.json", "c/0")}
    for name in ["exp", "a", *KEPT]:
        store = open_store(f"{base}/{name}/", read_only=True)
        assert object_sizes(store) == {"zarr.json": len(name.encode()), "c/0": 1}
        fs, root = filesystem(f"{base}/{name}")
        assert fs.cat_file(f"{root}/zarr.json") == name.encode()


def test_a_cache_beside_another_is_not_replaced(base: str, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    cache = make_cache(tmp_path)
    copy_cache(str(cache), f"{base}/exp", None)
    with sole_writer(f"{base}/exp#2"):
        copy_cache(str(cache), f"{base}/exp#2", (0, 1))
    assert CacheReader(f"{base}/exp").manifest == CacheReader(cache).manifest
    assert CacheReader(f"{base}/exp#2").manifest.shards.count == 1


REFUSED = {
    "s3://b//x": "must not have '//'",
    "s3://b/x//y": "must not have '//'",
    "gs://b/x/../y": "must not have '//', '.' or '..'",
    "hf://datasets/me/x/./y": "must not have '//', '.' or '..'",
    "ssh://h/a%2F..%2Fb": "must not have '//', '.' or '..'",
    "s3://b#1/x": r"the name of a bucket or host must not hold '#', '\?', '%' or a space, got 'b#1'",
    "gs://b?x=1": "the name of a bucket or host must not hold",
    "ssh://me@h%20/x": "the name of a bucket or host must not hold",
    "s3://b/x?versionId=3": r"remove '\?versionId='",
    "s3://b/x\ny": "holds a character that cannot be printed",
    "ssh://h/x%00": "holds a character that cannot be printed",
    "ssh://h/x%E9": "its percent escapes must be UTF-8",
    "ssh:///x": "names no bucket, repository or host",
    "ftp://h/x": "ftp:// is not supported",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_would_be_read_differently_is_refused_in_one_line(url: str) -> None:
    steps: list[Callable[[], object]] = [
        lambda: open_store(url, read_only=False),
        lambda: sole_writer(url).__enter__(),
        lambda: filesystem(url),
    ]
    for step in steps[1:] if url == "s3://b//x" else steps:
        with pytest.raises(LogitcaskError, match=REFUSED[url]) as refusal:
            step()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("place", ["h:x", "[::1", ":22", "h:99999"])
def test_a_host_or_port_that_is_none_is_one_line(place: str) -> None:
    with pytest.raises(LogitcaskError, match=r"must be ssh://USER@HOST:PORT/FOLDER|names no host"):
        filesystem(f"ssh://{place}/x")


def test_the_login_of_an_ssh_url_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr("sshfs.SSHFileSystem", lambda **named: given.append(named))
    assert filesystem("ssh://me%40home:p%2F%3A%23@[::1]:2222/a%20b#c/")[1] == "/a b#c"
    assert {name: given[0][name] for name in ("host", "port", "username", "password")} == {
        "host": "::1",
        "port": 2222,
        "username": "me@home",
        "password": "p/:#",
    }
    assert split_url("SSH://h") == ("ssh", "h", "")


def test_a_folder_that_a_console_created_is_empty(base: str, tmp_path: Path) -> None:
    """S3's and Google's consoles write an empty object with the folder's name and a slash."""
    cache = make_cache(tmp_path)
    (tmp_path / "far/made").mkdir(parents=True)
    if not base.startswith("ssh"):
        mark(base, "made/")
    store = open_store(f"{base}/made", read_only=False)
    assert is_empty(store)
    assert object_sizes(store) == {}
    copy_cache(str(cache), f"{base}/made", None)
    if not base.startswith("ssh"):
        mark(base, "made/commits/")
        mark(base, "made/other/")
    assert set(object_sizes(open_store(f"{base}/made", read_only=True))) == set(folder_bytes(cache))
    assert not is_empty(store)


def mark(base: str, key: str) -> None:
    """Write the empty object that marks a folder."""
    fs, root = filesystem(base)
    bucket, _, below = f"{root}/{key}".partition("/")
    if base.startswith("s3"):
        fs.call_s3("put_object", Bucket=bucket, Key=below, Body=b"")
    else:
        fs.pipe_file(f"{bucket}/{below}", b"")


def test_what_lies_at_a_url_is_named(base: str, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    write_objects(open_store(f"{base}/taken", read_only=False), {"notes.txt": b"x", "b/1": b"x", "a#": b"x", "z": b"x"})
    with pytest.raises(LogitcaskError, match=r"it holds 'a#', 'b', 'notes.txt' and 1 more: give a cache's own folder$"):
        CacheReader(f"{base}/taken")
    with pytest.raises(LogitcaskError, match=r"with a manifest in it; it is empty$"):
        CacheReader(f"{base}/none")
