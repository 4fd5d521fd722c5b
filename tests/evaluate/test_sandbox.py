"""The sandbox: what programs may do, what stops them, and that only programs that run to their end pass."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.evaluate import sandbox
from logitcask.pipeline.evaluate.sandbox import namespaces, run_program

HARMLESS = """
import collections, dataclasses, functools, hashlib, heapq, itertools, math, random, re, string, typing
import numpy
Point = collections.namedtuple("Point", "x y")
@dataclasses.dataclass
class Pair:
    a: int
    b: typing.List[int]
print(Point(1, 2), Pair(1, [2]), "naïve", hashlib.md5(b"x").hexdigest())
assert numpy.arange(4).sum() == 6 and eval("1 + 1") == 2
"""
GUESSES = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b"0 passed")
    except OSError:
        pass
"""


@pytest.mark.parametrize("program", ["", "x = 1\nassert x == 1", HARMLESS], ids=["empty", "assertion", "libraries"])
def test_correct_programs_pass(program: str) -> None:
    assert run_program(program) == "passed"


@pytest.mark.parametrize(
    "program",
    ["assert False", "def f(:", "1 / 0", "raise SystemExit(0)", "exit(0)", "\0", "input()", "x = bytearray(2**31)",
     "import os\nos.environ['SECRET']"],
)  # fmt: skip
def test_programs_that_raise_fail(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "key")
    assert run_program(program) == "failed"


@pytest.mark.parametrize("isolated", [True, False], ids=["namespaces", "interpreter"])
def test_forbidden_actions_fail_and_change_nothing(
    isolated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All attempts in one program, which passes if each of them is refused."""
    if not isolated:
        monkeypatch.setattr(sandbox, "namespaces", tuple)
    victim, new = str(tmp_path / "victim"), str(tmp_path / "new")
    Path(victim).write_text("whole")
    attempts = [
        f"open({new!r}, 'w')", f"open({victim!r}, 'a')", "open('here', 'w')",
        f"os.open({new!r}, os.O_CREAT | os.O_WRONLY)", f"os.remove({victim!r})",
        f"os.rename({victim!r}, 'x')", f"shutil.rmtree({victim!r})", f"os.rmdir({victim!r})",
        f"os.truncate({victim!r}, 0)", f"pathlib.Path({victim!r}).chmod(0)",
        "socket.socket()", "socket.create_connection(('127.0.0.1', 9))", "urllib.request.urlopen('http://127.0.0.1:9')",
        "subprocess.run(['true'])", "os.system('true')", "os.fork()", "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 9)", "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "ctypes.CDLL(None).getpid()",
    ]  # fmt: skip
    program = "import ctypes, os, pathlib, resource, shutil, socket, subprocess, urllib.error, urllib.request\n"
    for attempt in attempts:
        program += f"try:\n    {attempt}\nexcept (PermissionError, urllib.error.URLError):\n    pass\n"
        program += f"else:\n    raise AssertionError({attempt!r})\n"
    assert run_program(program) == "passed"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"victim": "whole"}


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        ("while True: pass", (1, 30)),
        ("import time\ntime.sleep(60)", (9, 1)),
        ("import os\nos._exit(0)", (9, 30)),
        (f"{GUESSES}os._exit(0)", (9, 30)),
    ],
    ids=["CPU", "clock", "exits", "guesses"],
)
def test_a_program_that_does_not_reach_its_end_is_stopped(
    program: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", limits[0])
    monkeypatch.setattr(sandbox, "WALL_SECONDS", limits[1])
    began = time.monotonic()
    assert run_program(program) == "stopped"
    assert time.monotonic() - began < 15


def test_a_program_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("import os\nassert sorted(os.listdir()) == ['program.py', 'result']") == "passed"
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_cannot_run_the_sandbox_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.require_sandbox()
    monkeypatch.setattr(sandbox, "MEMORY", 2**22)
    with pytest.raises(LogitcaskError, match=r"the sandbox cannot run .* within 4,194,304 bytes"):
        sandbox.require_sandbox()


@pytest.mark.skipif(not namespaces(), reason="this machine does not allow user namespaces")
def test_the_kernel_isolates_from_network_and_other_processes() -> None:
    """Without the interpreter's audit hook: a server that this process reaches cannot be reached from inside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        reached = [
            subprocess.run([*command, sys.executable, "-c", connect], stderr=subprocess.DEVNULL, check=False).returncode
            for command in ((), namespaces())
        ]
    assert reached == [0, 1]
    look = "import os; assert [name for name in os.listdir('/proc') if name.isdigit()] == ['1']"
    assert subprocess.run([*namespaces(), sys.executable, "-c", look], check=False).returncode == 0
