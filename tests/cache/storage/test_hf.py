"""Reading caches on the Hugging Face hub: its HTTP protocol, served by olah, a mirror of git repositories.

The mirror accepts no commits: ``test_hub.py`` writes. It requires a revision in the URL.
"""

import hashlib
import multiprocessing
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.copy import copy_cache
from tests.support.killed import copy_and_die
from tests.support.mistakes import said
from tests.support.runs import train
from tests.support.servers import Wire, hf_environment, hf_server
from tests.support.tiny import folder_bytes, make_cache

REPOSITORY = "hf://datasets/me/caches@main"
URL = f"{REPOSITORY}/code"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("hf"), shard_positions=64)


@pytest.fixture(scope="module")
def port(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / "mirrors/datasets/me/caches"
    shutil.copytree(cache, repository / "code")
    author = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    git = ["git", "-C", str(repository), *author]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    for file in (path for path in repository.rglob("code/**/*") if path.is_file() and path.suffix != ".json"):
        keep_as_lfs(file, repository / ".git/lfs/objects")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "A cache"], check=True)
    with hf_server(folder) as port:
        yield port


def keep_as_lfs(file: Path, objects: Path) -> None:
    """Store a file as the hub stores all but text: a pointer in git, the bytes beside it."""
    data = file.read_bytes()
    name = hashlib.sha256(data).hexdigest()
    place = objects / name[:2] / name[2:4] / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{name}\nsize {len(data)}\n")


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that points new processes at a port."""

    def at(port: int) -> None:
        for name, value in hf_environment(port, tmp_path / "home").items():
            monkeypatch.setenv(name, value)

    return at


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "logitcask", *command], capture_output=True, text=True, check=False, timeout=120
    )


def in_new_process(function: Callable[..., Any], *arguments: object, **named: object) -> int | None:
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments, kwargs=named)
    child.start()
    child.join()
    return child.exitcode


def test_a_killed_copy_from_the_hub_is_finished(
    cache: Path, port: int, reach: Callable[[int], None], tmp_path: Path
) -> None:
    reach(port)
    whole, back = folder_bytes(cache), tmp_path / "back"
    assert in_new_process(copy_and_die, URL, str(back), len(whole) // 2) == -signal.SIGKILL
    for _ in range(2):
        done = run("cache", "copy", URL, str(back))
        assert done.returncode == 0, done.stderr
    assert folder_bytes(back) == whole
    done = run("cache", "verify", URL)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_a_student_learns_the_same_from_a_part_over_a_wire_that_is_cut(
    cache: Path, port: int, reach: Callable[[int], None], tmp_path: Path
) -> None:
    copy_cache(str(cache), str(tmp_path / "near"), (1, 4))
    near = train(cache, tmp_path / "near_run", save_steps=3)
    with Wire(port, [20_000, 5_000]) as wire:
        reach(wire.port)
        done = run("cache", "copy", URL, str(tmp_path / "far"), "--shards", "1:4")
        assert done.returncode == 0, done.stderr
        assert wire.times_cut == 2
        wire.cuts += [8_000, 4_000]
        settings = {"save_steps": 3, "local_copies": tmp_path / "kept"}
        assert in_new_process(train, URL, tmp_path / "far_run", **settings) == 0
        assert wire.times_cut == 4
    assert folder_bytes(tmp_path / "far") == folder_bytes(tmp_path / "near")
    weights = "final/model.safetensors"
    assert (tmp_path / "far_run" / weights).read_bytes() == (near / weights).read_bytes()


def test_a_repository_that_is_not_there_is_one_line(port: int, reach: Callable[[int], None], tmp_path: Path) -> None:
    reach(port)
    refused = run("cache", "copy", "hf://datasets/me/none@main/code", str(tmp_path / "back"))
    assert refused.returncode == 2
    assert "not a logit cache" in said(refused.stderr)
