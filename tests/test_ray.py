"""Stage 1 on a real local Ray cluster: the bytes of one process, whoever dies; a folder or an object store."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.copy import copy_cache
from cache.errors import LogitcaskError
from cache.integrity import committed_shards
from cache.remote import filesystem
from cache.store import open_store
from cache.verify import verify
from pipeline.distributed import default_workers, worker_options
from pipeline.precompute import precompute
from pipeline.settings import PrecomputeSettings
from tests.servers import s3_environment, s3_server
from tests.tiny import RECORDS, folder_bytes, make_cache, make_teacher, precompute_settings, write_jsonl

SMALL = {"shard_positions": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, data, and at ``want`` the cache that one process makes."""
    place = tmp_path_factory.mktemp("ray")
    write_jsonl(place / "train.jsonl", RECORDS * 2)
    make_cache(
        place, make_teacher(place / "teacher"), train_data=str(place / "train.jsonl"), output=place / "want", **SMALL
    )
    return place


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes on this machine, with one processor each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def settings(folder: Path, output: Path | str, cluster: str) -> PrecomputeSettings:
    return precompute_settings(folder, output=output, ray=cluster, workers=2, **SMALL)


def test_two_workers_on_two_nodes_make_the_cache_of_one(folder: Path, cluster: str, tmp_path: Path) -> None:
    report = precompute(settings(folder, tmp_path / "cache", cluster))
    assert report.shards_written == report.manifest.shards.count > 4
    assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")


def test_a_killed_worker_is_started_again(folder: Path, cluster: str, tmp_path: Path) -> None:
    """A worker is killed in the middle, and one again; the run itself goes on."""
    run = start(folder, tmp_path / "cache", cluster)
    for shards in (1, 3):
        wait_for_shards(tmp_path / "cache", shards, run)
        victims = labellers()
        assert victims, "no worker was found to kill"
        os.kill(victims[0], signal.SIGKILL)
    assert run.wait(timeout=180) == 0
    assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")


def test_a_killed_driver_is_followed_by_the_same_command(folder: Path, cluster: str, tmp_path: Path) -> None:
    run = start(folder, tmp_path / "cache", cluster)
    wait_for_shards(tmp_path / "cache", 2, run)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    report = precompute(settings(folder, tmp_path / "cache", cluster))
    assert report.shards_found >= 2
    assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")


def test_an_object_store_is_a_target(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cluster started here, whose workers have this process's environment."""
    with s3_server(tmp_path) as port:
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        filesystem("s3://bucket/cache")[0].mkdir("bucket")
        precompute(settings(folder, "s3://bucket/cache", "local"))
        assert verify("s3://bucket/cache").problems == []
        copy_cache("s3://bucket/cache", str(tmp_path / "back"), None)
        with pytest.raises(LogitcaskError, match="complete already"):
            precompute(settings(folder, "s3://bucket/cache", "local"))
    assert folder_bytes(tmp_path / "back") == folder_bytes(folder / "want")


def test_what_a_worker_complains_of_is_one_line(folder: Path, cluster: str, tmp_path: Path) -> None:
    wrong = settings(folder, tmp_path / "cache", cluster).model_copy(update={"teacher_model": str(tmp_path / "none")})
    with pytest.raises(LogitcaskError, match="none"):
        precompute(wrong)
    with pytest.raises(LogitcaskError, match=r"--ray 127\.0\.0\.1:1: no cluster answers there"):
        precompute(settings(folder, tmp_path / "cache", "127.0.0.1:1"))


def test_workers_follow_the_accelerators(folder: Path, tmp_path: Path) -> None:
    many = precompute_settings(folder, output=tmp_path, tensor_parallel_size=4, device="auto")
    assert default_workers(many, {"GPU": 16.0, "CPU": 8.0}) == 4
    assert worker_options(many, {"GPU": 16.0, "CPU": 8.0}) == {"num_gpus": 4}
    assert default_workers(many, {"CPU": 8.0}) == 1
    assert worker_options(many.model_copy(update={"workers": 4}), {"CPU": 8.0}) == {"num_cpus": 2}


def start(folder: Path, output: Path, cluster: str) -> "subprocess.Popen[bytes]":
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given(folder, output, cluster).items()]
    return subprocess.Popen([sys.executable, "-m", "pipeline.cli", "precompute-logits", *options])


def given(folder: Path, output: Path, cluster: str) -> dict[str, object]:
    found = settings(folder, output, cluster).model_dump(mode="json", exclude_defaults=True)
    return {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}


def wait_for_shards(cache: Path, shards: int, run: "subprocess.Popen[bytes]") -> None:
    for _ in range(6000):
        with contextlib.suppress(OSError):
            if len(committed_shards(open_store(cache, read_only=False), 10_000)) >= shards:
                return
        assert run.poll() is None, "it ended before it was to be killed"
        time.sleep(0.005)
    raise AssertionError("no shard was written")


def labellers() -> list[int]:
    """Processes of the actors that are at work: Ray names them so."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if place.read_bytes().startswith(b"ray::Labeller"):
                found.append(int(place.parent.name))
    return found
