"""Stage 1 on a network folder, which two clients mount separately, as two machines do."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from logitcask.cache.verify import verify
from tests.support.forked import start
from tests.support.needed import lacking
from tests.support.servers import SshServer, ssh_server, user
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, write_jsonl

SMALL = {"shard_positions": 32}


@contextlib.contextmanager
def mounted(server: SshServer, folder: Path, place: Path) -> Iterator[Path]:
    """Mount a folder of the server at ``place``, over a separate connection."""
    if shutil.which("sshfs") is None or not os.access("/dev/fuse", os.W_OK):
        lacking("no sshfs or /dev/fuse here: apt-get install sshfs")
    place.mkdir()
    ssh = server.home / ".ssh"
    options = [f"IdentityFile={ssh / 'id_ed25519'}", f"UserKnownHostsFile={ssh / 'known_hosts'}", f"port={server.port}"]
    words = ["sshfs", f"{user()}@127.0.0.1:{folder}", str(place), *(word for each in options for word in ("-o", each))]
    mount = subprocess.run(words, capture_output=True, text=True, check=False)
    if mount.returncode:
        lacking(f"sshfs cannot mount here: {mount.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(place)], check=True)


def part(folder: Path, output: Path, which: str) -> BaseProcess:
    words = ["--teacher-model", folder / "teacher", "--train-data", folder / "train.jsonl", "--output", output,
             "--head-size=4", "--tail-draws=8", "--max-seq-length=64", "--batch-size=4", "--shard-positions=32",
             "--device=cpu", f"--shards={which}"]  # fmt: skip
    return start(["precompute-logits", *words])


def ended(run: BaseProcess) -> int | None:
    run.join(400)
    return run.exitcode


def test_two_clients_of_a_network_folder_make_the_cache_of_one(tmp_path: Path) -> None:
    """Each labels a part through its own mount; one is killed midway and run again."""
    write_jsonl(tmp_path / "train.jsonl", RECORDS * 2)
    make_cache(tmp_path, make_teacher(tmp_path / "teacher"), train_data=str(tmp_path / "train.jsonl"),
               output=tmp_path / "want", **SMALL)  # fmt: skip
    shared, commits = tmp_path / "shared", tmp_path / "shared/cache/commits/c"
    shared.mkdir()
    with (
        ssh_server(tmp_path) as server,
        mounted(server, shared, tmp_path / "one") as one,
        mounted(server, shared, tmp_path / "two") as two,
    ):
        runs = [part(tmp_path, one / "cache", "1/2"), part(tmp_path, two / "cache", "2/2")]
        while not (commits.exists() and len(list(commits.iterdir())) > 2):
            assert all(run.is_alive() for run in runs), "a run ended before it could be killed"
            time.sleep(0.005)
        runs[0].kill()
        assert [ended(run) for run in runs] == [-signal.SIGKILL, 0]
        assert ended(part(tmp_path, one / "cache", "1/2")) == 0
        assert verify(one / "cache").problems == []  # the other mount's listing may be stale, for 20 seconds
    assert folder_bytes(shared / "cache") == folder_bytes(tmp_path / "want")
