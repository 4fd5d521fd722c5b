"""Processes that start at once: forked from one that has done nothing but the slow imports."""

import atexit
import gc
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.servers import free_port

IMPORTED = [
    "logitcask.pipeline.evaluate.evaluate",
    "logitcask.pipeline.models.generate",
    "logitcask.pipeline.precompute.precompute",
    "logitcask.pipeline.train.train",
    "tests.support.tiny",
    "torch._dynamo",
]


def forks() -> ForkServerContext:
    """Return the context that forks them, with the environment in which the first one started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def calling(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Return a process, not started, that calls a function with this process's environment."""
    return forks().Process(target=_call, args=(dict(os.environ), function, arguments))


def start(words: Sequence[object], said: Path | None = None, errors: Path | None = None) -> BaseProcess:
    """Start ``logitcask`` as a process; what it prints goes to files, if given."""
    child = forks().Process(
        target=_command, args=("logitcask", list(map(str, words)), dict(os.environ), None, said, errors)
    )
    child.start()
    return child


def alone(
    folder: Path,
    words: Sequence[object],
    environment: Mapping[str, str | None] | None = None,
    *,
    limit: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``logitcask`` as a process, optionally limited to so many bytes beyond those used after its imports."""
    return ran(folder, words, [environment or {}], limit=limit)


def on_two_ranks(
    folder: Path, words: Sequence[object], *, module: str = "logitcask", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module's command on two ranks, with the environment in which a launcher starts them."""
    common = {**(environment or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    return ran(folder, words, [{**common, "RANK": n, "LOCAL_RANK": n} for n in ("0", "1")], module=module)


def ran(
    folder: Path,
    words: Sequence[object],
    environments: Sequence[Mapping[str, str | None]],
    *,
    module: str = "logitcask",
    limit: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module's command, or a script, in one process per environment, and return what all of them printed.

    The environments are changes of this process's; what is None is unset. The exit code is the first that is not 0;
    files in the folder keep what was printed.
    """
    text = list(map(str, words))
    said = [folder / f"said {n}" for n in range(len(environments))]
    errors = [folder / f"errors {n}" for n in range(len(environments))]
    children = [
        forks().Process(target=_command, args=(module, text, {**os.environ, **environment}, limit, out, err))
        for environment, out, err in zip(environments, said, errors, strict=True)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(180)
        child.kill()  # if it still waits for a rank that is gone
        child.join()
    code = next((child.exitcode for child in children if child.exitcode), 0)
    return subprocess.CompletedProcess(
        text, code, "".join(file.read_text() for file in said), "".join(file.read_text() for file in errors)
    )


def _call(environment: Mapping[str, str], function: Callable[..., object], arguments: Sequence[Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _command(
    module: str,
    words: list[str],
    environment: Mapping[str, str | None],
    limit: int | None,
    said: Path | None,
    errors: Path | None,
) -> None:
    gc.freeze()
    for path, descriptor in ((said, 1), (errors, 2)):
        if path is not None:
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    if limit is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
    sys.argv = [module, *words]
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process skips them
