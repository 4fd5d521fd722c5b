"""Local servers: the protocols of S3, Google and the hub, OpenSSH on loopback, and a connection that is cut."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.needed import lacking


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, f"the server exited with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing is listening on port {port}")


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            wait_for(port, process)
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Run a server of S3's protocol; yield its port."""
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-p", str(port)], port, folder / "s3.log"):
        yield port


def s3_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def gs_server(folder: Path, bucket: str) -> Iterator[int]:
    """Run a server of Google Cloud Storage's JSON protocol with one bucket; yield its port."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--in-memory", "--quiet", "--default-bucket", bucket]
    with running([sys.executable, "-m", "gcp_storage_emulator", "start", *options], port, folder / "gs.log"):
        yield port


def gs_environment(port: int) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}


HUB = """
[basic]
repos-path = "{folder}/fetched"
mirrors-path = ["{folder}/mirrors"]
hf-scheme = "http"
hf-netloc = "127.0.0.1:9"
hf-lfs-netloc = "127.0.0.1:9"

[accessibility]
offline = true
"""


@contextlib.contextmanager
def hf_server(folder: Path) -> Iterator[int]:
    """Serve the git repositories in ``mirrors/`` over the hub's HTTP protocol, for reading; yield the port."""
    port = free_port()
    (folder / "hub.toml").write_text(HUB.format(folder=folder))
    options = ["--config", str(folder / "hub.toml"), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "olah.server", *options, "--log-path", str(folder / "logs")]
    with running(command, port, folder / "hub.log"):
        yield port


def hf_environment(port: int, home: Path) -> dict[str, str]:
    """Return the environment for a new process: the hub's library reads it at import."""
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


@dataclass(frozen=True)
class SshServer:
    """An OpenSSH server; ``home`` is the home folder of a client with a key for it."""

    port: int
    home: Path

    def know(self, port: int) -> None:
        """Trust the server's key at another port too."""
        key = (self.home.parent / "host_key.pub").read_text()
        with (self.home / ".ssh/known_hosts").open("a") as file:
            file.write(f"[127.0.0.1]:{port} {key}")

    def url(self, path: Path, port: int = 0) -> str:
        return f"ssh://{user()}@127.0.0.1:{port or self.port}{path}"

    def command(self) -> str:
        """Return the ssh command for rsync."""
        ssh = self.home / ".ssh"
        return f"ssh -p {self.port} -i {ssh}/id_ed25519 -o UserKnownHostsFile={ssh}/known_hosts"


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    """Run an OpenSSH server on loopback."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh-keygen") is None:
        lacking("no OpenSSH server here: apt-get install openssh-server rsync")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    home, port = folder / "home", free_port()
    (home / ".ssh").mkdir(parents=True)
    for key in (folder / "host_key", home / ".ssh/id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    config = folder / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {home}/.ssh/id_ed25519.pub\nSubsystem sftp internal-sftp\nMaxStartups 100\n"
        "PermitRootLogin yes\n"
    )
    server = SshServer(port, home)
    server.know(port)
    with running([sshd, "-D", "-e", "-f", str(config)], port, folder / "sshd.log"):
        yield server


class Wire:
    """A port that forwards to another and drops connections after each of ``cuts`` bytes, then works, or stays down."""

    def __init__(self, target: int, cuts: list[int], *, down_after: bool = False) -> None:
        self.target, self.cuts, self.down_after, self.times_cut = target, cuts, down_after, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._carried, self._lock = 0, threading.Lock()
        self._open: set[socket.socket] = set()

    def __enter__(self) -> "Wire":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._drop()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.down_after and not self.cuts:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                for end in (client, server):  # send small answers at once
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._open |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    self._carried += len(data)
                    cut = bool(self.cuts) and self._carried >= self.cuts[0]
                    if cut:
                        self.cuts.pop(0)
                        self._carried, self.times_cut = 0, self.times_cut + 1
                if cut:
                    self._drop()
                    return
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _drop(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
