"""Worker processes for encoding. This process reads; chunks of records go out, and what comes of them comes back."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Protocol

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.tokens.packed import PackedChunk

MOST_WORKERS = 16
AHEAD = 2  # chunks per worker that are on their way
START = "import sys; from logitcask.pipeline.text.tokens.worker import work; work(int(sys.argv[1]))"
Encode = Callable[[bytes], PackedChunk]  # of pickled records; can be pickled itself
Promise = Callable[[], PackedChunk]  # waits for what comes of a chunk


class Pool(Protocol):
    """What encodes chunks elsewhere, ``depth`` of them at a time."""

    depth: int

    def submit(self, message: bytes) -> Promise:
        """Send pickled records."""


Workers = Callable[[Encode], AbstractContextManager[Pool | None]]  # None: there are none but this process


def usual_workers() -> int:
    """Return how many processes tokenize by default: one per core, at most 16."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def processes(count: int | None) -> Workers:
    """Return what starts ``count`` processes that encode, by default one per core, once the first chunk is submitted.

    What they give raises LogitcaskError if one of them ends.
    """

    @contextlib.contextmanager
    def workers(encode: Encode) -> Iterator[Pool | None]:
        wanted = count or usual_workers()
        with contextlib.ExitStack() as stack:
            yield _Processes(encode, wanted, stack) if wanted > 1 else None

    return workers


@dataclass
class _Answer:
    packed: PackedChunk | None = None


class _Processes:
    """Processes, started when first needed, with a pipe and the answers that are awaited through it each."""

    def __init__(self, encode: Encode, count: int, stack: contextlib.ExitStack) -> None:
        self._encode, self._count, self._stack, self.depth = encode, count, stack, AHEAD * count
        self._awaited: dict[Connection, deque[_Answer]] = {}

    def submit(self, message: bytes) -> Promise:
        """Send pickled records to the process that has the least to do."""
        if not self._awaited:
            self._start()
        connection = min(self._awaited, key=lambda each: len(self._awaited[each]))
        with _explained():
            connection.send_bytes(message)
        answer = _Answer()
        self._awaited[connection].append(answer)
        return partial(self._result, answer)

    def _result(self, answer: _Answer) -> PackedChunk:
        while answer.packed is None:
            for connection in wait([each for each, awaited in self._awaited.items() if awaited]):
                assert isinstance(connection, Connection)
                with _explained():
                    self._awaited[connection].popleft().packed = connection.recv()
        return answer.packed

    def _start(self) -> None:
        encode = pickle.dumps(self._encode)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # the processes are the threads
        with _explained():
            for _ in range(self._count):
                here, there = multiprocessing.Pipe()
                self._stack.callback(here.close)
                handle = str(there.fileno())
                command = [sys.executable, "-P", "-c", START, handle]  # -P: no module of the current folder's
                process = subprocess.Popen(
                    command,
                    env=environment,
                    pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process, which ends them
                )
                self._stack.callback(_end, process)
                there.close()
                self._awaited[here] = deque()
            for connection in self._awaited:
                connection.send_bytes(encode)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise LogitcaskError(
            "a process that tokenizes ended or could not be started, perhaps for lack of memory: run the same command "
            "again, with --tokenize-workers 1 if it ends again"
        ) from error
