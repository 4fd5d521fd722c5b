"""Run programs that a model wrote, each in a process with limits; docs/guides/evaluate.md has what they let through."""

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.evaluate import sandbox_child

CPU_SECONDS = 3  # HumanEval's own limit
WALL_SECONDS = 15  # for programs that wait, and machines that are busy
MEMORY = 2**30  # bytes of address space
ENVIRONMENT = ("PATH",)  # the only variables that a program inherits: no keys
NAMESPACES = ("unshare", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "--")

Outcome = Literal["passed", "failed", "stopped"]


@functools.cache
def namespaces() -> tuple[str, ...]:
    """Return the command that isolates a process from network and other processes; empty if this machine forbids it."""
    try:
        done = subprocess.run([*NAMESPACES, sys.executable, "-I", "-c", ""], capture_output=True, check=False)
    except OSError:
        return ()
    return NAMESPACES if done.returncode == 0 else ()


def require_sandbox() -> None:
    """Raise LogitcaskError if not even an empty program runs to its end: every score would be 0."""
    if find_spec("resource") is None:
        raise LogitcaskError("--humaneval needs limits on processes, which this system lacks: use Linux or macOS")
    if run_program("") != "passed":
        raise LogitcaskError(
            f"the sandbox cannot run {sys.executable} within {MEMORY:,} bytes and {WALL_SECONDS} s on this machine: "
            "evaluate on another one"
        )


def run_program(program: str) -> Outcome:
    """Run a Python program: it passed (ran to its end), failed (raised), or was stopped by a limit or its own exit."""
    nonce = secrets.token_hex(16)
    child = [sys.executable, "-I", "-B", "-X", "utf8", sandbox_child.__file__]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, sandbox_child.PROGRAM).write_text(program, encoding="utf-8", errors="replace")
        with subprocess.Popen(
            [*namespaces(), *child, nonce, str(CPU_SECONDS), str(MEMORY)],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                process.wait(WALL_SECONDS)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        return _outcome(Path(folder, sandbox_child.RESULT), nonce)


def _outcome(file: Path, nonce: str) -> Outcome:
    with contextlib.suppress(OSError):
        match file.read_text(errors="replace").split():
            case [written, "passed"] if written == nonce:
                return "passed"
            case [written, "failed"] if written == nonce:
                return "failed"
    return "stopped"
