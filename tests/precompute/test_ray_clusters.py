"""Which Ray cluster stage 1 runs on, and the resources it requests: an existing, a new and an autoscaling one."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.remote import filesystem
from logitcask.cache.verify import verify
from logitcask.pipeline.cli import app
from logitcask.pipeline.precompute.precompute import precompute, teacher_spec
from logitcask.pipeline.precompute.ray import RayExecutor, default_workers, missing_resources, worker_options
from tests.precompute.test_ray import (
    HEAD,
    SMALL,
    START,
    Machine,
    cluster,
    command,
    folder,
    machines,
    settings,
    wait_for_nodes,
)
from tests.support.servers import s3_environment, s3_server
from tests.support.tiny import folder_bytes, precompute_settings

__all__ = ["cluster", "folder", "machines"]  # fixtures


@contextlib.contextmanager
def growing_cluster(machine: Machine, folder: Path) -> Iterator[str]:
    """Start Ray's autoscaler with its provider of nodes on one machine; at first only the head, which has no CPU."""
    kind = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100 << 20}, "node_config": {}, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "provider": {"type": "fake_multinode", "launch_multiple": True, "worker_liveness_check": False},
        "available_node_types": {"ray.head.default": head, "ray.worker.gpu": kind},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1.0,
        **{name: {} for name in ("auth", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "worker_setup_commands", "worker_start_ray_commands")},
    }
    (folder / "growing.json").write_text(json.dumps(config))
    id_of_head = "f" * 51 + "00000"  # as the provider expects
    more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_CLOUD_INSTANCE_ID": id_of_head,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": id_of_head}  # fmt: skip
    options = ["--num-cpus=0", "--num-gpus=0", *HEAD, f"--node-ip-address={machine.address}"]
    command = [*START, *options, f"--autoscaling-config={folder / 'growing.json'}"]
    with (folder / "ray.log").open("wb") as out, machine.popen(command, more, stdout=out, stderr=out) as node:
        try:
            wait_for_nodes(1, node, folder / "ray.log")
            yield f"{machine.address}:6379"
        finally:
            node.terminate()


@pytest.mark.nightly
def test_an_autoscaler_provides_the_workers(folder: Path, machines: list[Machine], tmp_path: Path) -> None:
    """The cluster grows from no CPU to two workers, then from no accelerator to one."""
    machine = machines[0]
    with growing_cluster(machine, tmp_path) as address:
        words = command(folder, tmp_path / "cache", address)
        with machine.popen(words, stderr=subprocess.PIPE) as run:
            _, err = run.communicate(timeout=480)
        assert run.returncode == 0, err.decode()
        assert (
            b"waiting for Ray's autoscaler, or for nodes that you add: 2 workers need 2 CPUs, the cluster has 0" in err
        )
        assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")
        words = command(folder, tmp_path / "other", address)
        words = [word for word in words if not word.startswith("--device")] + ["--device=cuda"]
        with machine.popen(words, stderr=subprocess.PIPE) as run:
            _, err = run.communicate(timeout=480)
        assert run.returncode == 2
        assert err.splitlines()[-3] == b"error: --device cuda: no such device here", "the error of a worker"


def test_accelerators_are_requested_if_the_device_is_cuda(folder: Path, tmp_path: Path) -> None:
    """Even on a cluster that has none yet."""
    cuda = teacher_spec(
        precompute_settings(folder, output=tmp_path, device="cuda", engine="vllm", tensor_parallel_size=2)
    )
    assert worker_options(cuda, 4, {"CPU": 8.0}, [8.0]) == {"num_gpus": 2}
    assert default_workers(2, {"CPU": 8.0}) == 1
    assert worker_options(replace(cuda, device="cpu"), 4, {"GPU": 16.0, "CPU": 8.0}, [8.0]) == {"num_cpus": 2}
    notice = "4 workers need 8 GPUs, the cluster has 2"
    assert missing_resources({"num_gpus": 2}, 4, {"GPU": 2.0}).endswith(notice)
    assert missing_resources({"num_gpus": 2}, 4, {"GPU": 8.0}) == ""


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (["--ray"], "auto"),
        (["--ray", "--workers", "2"], "auto"),
        (["--ray", "10.0.0.1:6379", "--workers=2"], "10.0.0.1:6379"),
        (["--ray=local"], "local"),
        ([], None),
    ],
)
def test_ray_may_be_given_without_an_address(words: list[str], address: str | None) -> None:
    command: Any = typer.main.get_command(app)
    assert command.commands["precompute-logits"].make_context("precompute-logits", words).params["ray"] == address


def test_without_an_address_an_existing_cluster_is_used(
    folder: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    write = RayExecutor.write_shards

    def spy(self: RayExecutor, *arguments: Any) -> None:
        seen.append(ray.get_runtime_context().gcs_address)
        write(self, *arguments)

    monkeypatch.setattr(RayExecutor, "write_shards", spy)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    precompute(settings(folder, tmp_path / "cache", "auto").model_copy(update={"workers": 1}))
    assert seen == [cluster]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(LogitcaskError, match=r"--ray 127\.0\.0\.1:1: no cluster answers there"):
        precompute(settings(folder, tmp_path / "other", "auto"))


@pytest.mark.nightly
def test_without_an_address_a_cluster_is_started_if_there_is_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers have this environment, in which they reach an object store, which can hold the cache.

    In another process: otherwise Ray would expect the new cluster's token in all later connections of this process.
    """
    with s3_server(tmp_path) as port, tempfile.TemporaryDirectory() as place:  # for Ray's files: socket names are short
        for name, value in {**s3_environment(port), "RAY_TMPDIR": place}.items():
            monkeypatch.setenv(name, value)
        filesystem("s3://bucket/cache")[0].mkdir("bucket")
        words = [word for word in command(folder, "s3://bucket/cache", "auto") if not word.startswith("--ray=")]
        subprocess.run([*words, "--ray"], check=True)
        assert verify("s3://bucket/cache").problems == []
        copy_cache("s3://bucket/cache", str(tmp_path / "back"), None)
        assert precompute(precompute_settings(folder, output="s3://bucket/cache", **SMALL)).shards_written == 0
    assert folder_bytes(tmp_path / "back") == folder_bytes(folder / "want")
