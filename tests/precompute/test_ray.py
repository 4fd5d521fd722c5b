"""Stage 1 on a real local Ray cluster: same bytes as one process, whatever dies."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.integrity import committed_shards
from logitcask.cache.storage.open import open_store
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.precompute.precompute import precompute, teacher_spec
from logitcask.pipeline.precompute.ray import _connect, _Tasks, default_workers, worker_options
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.text.tokens import stage
from logitcask.pipeline.text.tokens.workers import Promise
from tests.support.forked import start
from tests.support.needed import lacking
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, precompute_settings, write_jsonl

SMALL = {"shard_positions": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, data, and in ``want`` the cache that one process makes."""
    place = tmp_path_factory.mktemp("ray")
    write_jsonl(place / "train.jsonl", RECORDS * 2)
    make_cache(
        place, make_teacher(place / "teacher"), train_data=str(place / "train.jsonl"), output=place / "want", **SMALL
    )
    return place


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes on this machine, with one CPU each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def settings(folder: Path, output: Path | str, cluster: str) -> PrecomputeSettings:
    return precompute_settings(folder, output=output, ray=cluster, workers=2, **SMALL)


@pytest.mark.nightly
def test_exact_labels_are_those_of_one_process(folder: Path, cluster: str) -> None:
    exact: dict[str, Any] = {"preset": "exact", "head_size": 4, "tail_draws": 0, **SMALL}
    for output, where in ((folder / "one", {}), (folder / "two", {"ray": cluster, "workers": 2})):
        precompute(precompute_settings(folder, output=output, **exact, **where))
    assert folder_bytes(folder / "two") == folder_bytes(folder / "one")


def test_two_workers_on_two_nodes_make_the_cache_of_one_process(
    folder: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, tokens made in tasks, and categories; records are chosen by ``--where``, some in a chunk that is no whole
    one, and figures are per category.
    """
    rows = [
        {**record, "category": f"c{n % 3}", "language": ("en", "fr")[n % 5 == 0]} for n, record in enumerate(RECORDS)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "plain", "language": "de"}])
    options: dict[str, object] = {"teacher_model": str(folder / "teacher"), "train_data": str(data), **SMALL}
    one = precompute_settings(tmp_path, output=tmp_path / "one", where="language=en,language=fr", **options)
    precompute(one)
    monkeypatch.setattr(stage, "ALONE", 0)
    monkeypatch.setattr(stage, "RECORDS", 5)
    submitted, submit = list[int](), _Tasks.submit

    def counted(self: _Tasks, message: bytes) -> Promise:
        submitted.append(len(message))
        return submit(self, message)

    monkeypatch.setattr(_Tasks, "submit", counted)
    report = precompute(one.model_copy(update={"output": tmp_path / "ray", "ray": cluster, "workers": 2}))
    assert report.shards_written == report.manifest.shards.count > 4
    assert len(submitted) == 5
    assert folder_bytes(tmp_path / "ray") == folder_bytes(tmp_path / "one")
    settings = EvaluateSettings.model_validate(
        {"model": str(folder / "teacher"), "cache": str(tmp_path / "ray"), "device": "cpu"}
    )
    figures = evaluate(settings).on_cache
    assert figures is not None
    sizes = {group.value: group.examples for group in figures.groups}
    assert sizes == {"c0": 8, "c1": 8, "c2": 8, "en": 19, "fr": 5}
    french = evaluate(settings.model_copy(update={"where": {"language": ("fr",)}})).on_cache
    assert french is not None
    assert french.examples == 5


@dataclass(frozen=True)
class Machine:
    """A separate network, as on another machine; the disk is shared."""

    name: str
    address: str
    token: Path  # the cluster's: the token of this machine's user is left alone

    def popen(
        self, command: list[str], more: dict[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[bytes]":
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            **(more or {}),
        }
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], env=environment, **options)

    def remove(self) -> None:
        """Kill whatever still runs there and delete the network, if they exist."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], check=False, capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)

    def network(self) -> int:
        return os.stat(f"/run/netns/{self.name}").st_ino


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two networks joined by a virtual cable, with nothing else in them."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        lacking("networks need root and iproute2")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    pair = [Machine(f"logitcask-{os.getpid()}-{n}", f"10.213.77.{n}", token) for n in (1, 2)]
    ends = [f"lc{os.getpid()}n{n}" for n in (1, 2)]
    try:
        for machine in pair:
            ip("netns", "add", machine.name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for machine, end, other in zip(pair, ends, reversed(pair), strict=True):
            ip("link", "set", end, "netns", machine.name)
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", end)
            for name in (end, "lo"):
                ip("-n", machine.name, "link", "set", name, "up")
            ip("-n", machine.name, "route", "add", "default", "via", other.address)
        yield pair
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot create networks here: {error.stderr.strip()}")
    finally:
        for machine in pair:
            machine.remove()


START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
HEAD = ["--head", "--port=6379", "--include-dashboard=false"]


def wait_for_nodes(count: int, last: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(1_800):
        if log.read_bytes().count(b"Ray runtime started") >= count:
            return
        assert last.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@contextlib.contextmanager
def cluster_of(machines: list[Machine], log: Path) -> Iterator[str]:
    """Start a Ray node on each machine, as the manual says."""
    address = f"{machines[0].address}:6379"
    roles = (HEAD, [f"--address={address}"])
    with log.open("wb") as out, contextlib.ExitStack() as running:
        for machine, role in zip(machines, roles, strict=True):
            command = [*START, "--num-cpus=1", *role, f"--node-ip-address={machine.address}"]
            node = running.enter_context(machine.popen(command, stdout=out, stderr=out))
            running.callback(node.terminate)
            wait_for_nodes(machines.index(machine) + 1, node, log)
        yield address


@pytest.mark.nightly  # two nodes in one network are tested in every check
def test_two_machines_make_the_cache_of_one(folder: Path, machines: list[Machine], tmp_path: Path) -> None:
    """A worker in each network, and none in this one."""
    networks: set[int] = set()
    with (
        cluster_of(machines, tmp_path / "ray.log") as address,
        machines[0].popen(command(folder, tmp_path / "cache", address), stderr=subprocess.PIPE) as run,
        contextlib.ExitStack() as ending,
    ):
        ending.callback(run.kill)
        while run.poll() is None:
            networks |= {network for pid in labellers(address) if (network := network_of(pid))}
            time.sleep(0.1)
        assert run.stderr
        assert run.returncode == 0, run.stderr.read().decode() + (tmp_path / "ray.log").read_text()
    assert networks >= {machine.network() for machine in machines}
    assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")


def network_of(process: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{process}/ns/net").st_ino
    return None


def test_a_killed_worker_is_restarted(folder: Path, cluster: str, tmp_path: Path) -> None:
    """A worker is killed midway, then another; the run itself continues."""
    run = start(words(folder, tmp_path / "cache", cluster))
    for shards in (1, 3):
        wait_for_shards(tmp_path / "cache", shards, run)
        victims = labellers(cluster)
        assert victims, "there was no worker to kill"
        os.kill(victims[0], signal.SIGKILL)
    run.join(400)
    assert run.exitcode == 0
    assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")


@pytest.mark.nightly  # a killed worker, and a killed run without Ray, are tested in every check
def test_a_killed_driver_is_followed_by_the_same_command(folder: Path, cluster: str, tmp_path: Path) -> None:
    run = start(words(folder, tmp_path / "cache", cluster))
    wait_for_shards(tmp_path / "cache", 2, run)
    run.kill()
    run.join()
    report = precompute(settings(folder, tmp_path / "cache", cluster))
    assert report.shards_found >= 2
    assert folder_bytes(tmp_path / "cache") == folder_bytes(folder / "want")


def test_a_workers_error_is_one_line(folder: Path, cluster: str, tmp_path: Path) -> None:
    """This process reads the tokenizer, the workers the weights."""
    shutil.copytree(folder / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    wrong = settings(folder, tmp_path / "cache", cluster).model_copy(
        update={"teacher_model": str(tmp_path / "teacher"), "workers": 1}
    )
    for _ in range(2):  # a run that failed has left the cluster
        with pytest.raises(LogitcaskError) as refused:
            precompute(wrong)
        assert str(refused.value).startswith(f"{tmp_path / 'teacher'}: no causal language model could be loaded: ")
    with pytest.raises(LogitcaskError, match=r"--ray 127\.0\.0\.1:1: no cluster answers there"):
        precompute(settings(folder, tmp_path / "cache", "127.0.0.1:1"))


def test_a_node_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def slow(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(LogitcaskError, match=r"--ray auto: no cluster answers there: The current node .* startup"):
        _connect("auto")


def test_workers_follow_the_accelerators(folder: Path, tmp_path: Path) -> None:
    many = teacher_spec(
        precompute_settings(folder, output=tmp_path, tensor_parallel_size=4, engine="vllm", device="auto")
    )
    assert default_workers(4, {"GPU": 16.0, "CPU": 8.0}) == 4
    assert worker_options(many, None, {"GPU": 16.0, "CPU": 8.0}, [8.0]) == {"num_gpus": 4}
    assert default_workers(4, {"CPU": 8.0}) == 1
    for workers, nodes, share in (
        (4, [8.0], 2), (None, [8.0], 8), (1, [1.0, 1.0], 1), (3, [3.0, 3.0], 1), (2, [4.0, 6.0], 4), (3, [4.0, 6.0], 3),
        (9, [4.0], 1), (2, [0.0], 1), (2, [], 1),
    ):  # fmt: skip
        assert worker_options(many, workers, {"CPU": sum(nodes)}, nodes) == {"num_cpus": share}, (workers, nodes)


def command(folder: Path, output: Path | str, cluster: str) -> list[str]:
    return [sys.executable, "-m", "logitcask", *words(folder, output, cluster)]


def words(folder: Path, output: Path | str, cluster: str) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given(folder, output, cluster).items()]
    return ["precompute-logits", *options]


def given(folder: Path, output: Path | str, cluster: str) -> dict[str, object]:
    options = settings(folder, output, cluster).model_dump(mode="json", exclude_defaults=True)
    return {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in options.items()}


def wait_for_shards(cache: Path, shards: int, run: BaseProcess) -> None:
    for _ in range(60_000):
        with contextlib.suppress(OSError):
            if len(committed_shards(open_store(cache, read_only=False), 10_000)) >= shards:
                return
        assert run.is_alive(), "the run ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError("no shard was written")


def labellers(cluster: str) -> list[int]:
    """Return the processes in which a cluster's actors run, by the name Ray gives them; other clusters may exist."""
    processes = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if place.read_bytes().startswith(b"ray::Labeller"):
                parent = (place.parent / "stat").read_text().rpartition(")")[2].split()[1]
                if cluster.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                    processes.append(int(place.parent.name))
    return processes
