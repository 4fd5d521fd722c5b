"""Processes that start at once: forked from one that has done nothing but the slow imports."""

import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from logitcask.pipeline import cli

IMPORTED = [
    "logitcask.pipeline.evaluate.evaluate",
    "logitcask.pipeline.models.generate",
    "logitcask.pipeline.precompute.precompute",
    "logitcask.pipeline.train.train",
    "torch._dynamo",
]


def forks() -> ForkServerContext:
    """Return the context that forks them. All have the environment in which the first one started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def limited(folder: Path, words: Sequence[str], limit: int | None) -> subprocess.CompletedProcess[str]:
    """Run ``logitcask`` as a process, optionally limited to so many bytes beyond those used after its imports."""
    said, errors = folder / "said", folder / "errors"
    child = forks().Process(target=_command, args=(words, limit, said, errors))
    child.start()
    child.join()
    return subprocess.CompletedProcess(words, child.exitcode or 0, said.read_text(), errors.read_text())


def _command(words: Sequence[str], limit: int | None, said: Path, errors: Path) -> None:
    for path, descriptor in ((said, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    if limit is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
    sys.argv = ["logitcask", *words]
    cli.main()
