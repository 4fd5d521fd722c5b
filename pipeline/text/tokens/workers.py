"""Worker processes for encoding. This process reads; chunks of records go out, and outcomes come back in order."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.bad_records import Notices
from logitcask.pipeline.text.examples import Encoder, Outcome
from logitcask.pipeline.text.records import Raw

ALONE = 4096  # records that are encoded here before workers are started, which takes seconds
CHUNK = 256  # records
CHUNK_BYTES = 4 << 20  # as pickled; a longer chunk is cut, unless it is one record
MOST_WORKERS = 16
START = "import sys; from logitcask.pipeline.text.tokens.worker import work; work(int(sys.argv[1]))"
Encode = Callable[[Iterator[Raw]], Iterator[tuple[Raw, Outcome]]]


def usual_workers() -> int:
    """Return how many processes tokenize by default: one per core, at most 16."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextlib.contextmanager
def workers(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[Encode]:
    """Yield what encodes records with an encoder's ``tokenizer``, in ``count`` processes unless the data is small.

    The outcomes, and what ``encoder`` finds out, are those of one process. A tokenizer that comes with code of its own
    is used in this process alone. Raises LogitcaskError if a worker ends.
    """
    with contextlib.ExitStack() as stack:
        several = count > 1 and type(tokenizer).__module__.startswith("transformers.")
        pool = _Pool(encoder, count, stack)
        alone = 0

        def encode(records: Iterator[Raw]) -> Iterator[tuple[Raw, Outcome]]:
            nonlocal alone
            first = itertools.islice(records, ALONE - alone) if several else records
            for raw in first:
                alone += 1
                yield raw, encoder.outcome(raw[1])
            yield from pool.encode(records)

        yield encode


@dataclass
class _Chunk:
    """Records on their way; an error of reading comes after the records before it."""

    records: list[Raw]
    fault: LogitcaskError | None = None
    outcomes: list[Outcome] | None = None
    notices: Notices | None = None


class _Pool:
    """Worker processes, started when first needed; each has one chunk at a time."""

    def __init__(self, encoder: Encoder, count: int, stack: contextlib.ExitStack) -> None:
        self._encoder, self._count, self._stack = encoder, count, stack
        self._idle: list[Connection] = []
        self._busy: dict[Connection, _Chunk] = {}
        self._started = False

    def encode(self, records: Iterator[Raw]) -> Iterator[tuple[Raw, Outcome]]:
        chunks, queue = _chunks(records), deque[_Chunk]()
        while True:
            while len(queue) < 2 * self._count and (self._idle or not self._started):
                chunk = next(chunks, None)
                if chunk is None:
                    break
                queue.append(chunk)
                self._hand_out(chunk)
            if not queue:
                return
            if queue[0].notices is None:
                self._receive()
                continue
            yield from self._settled(queue.popleft())

    def _settled(self, chunk: _Chunk) -> Iterator[tuple[Raw, Outcome]]:
        assert chunk.outcomes is not None
        assert chunk.notices is not None
        self._encoder.take(chunk.notices)
        yield from zip(chunk.records, chunk.outcomes, strict=True)
        if chunk.fault:
            raise chunk.fault

    def _hand_out(self, chunk: _Chunk) -> None:
        try:
            message = pickle.dumps([record for _, record in chunk.records])
        except Exception:  # a data set of the hub may hold what no other process can take, such as an open file
            chunk.outcomes, chunk.notices = self._encoder.silent().chunk([record for _, record in chunk.records])
            return
        if not self._started:
            self._start()
        connection = self._idle.pop()
        self._busy[connection] = chunk
        with _explained():
            connection.send_bytes(message)

    def _receive(self) -> None:
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            with _explained():
                chunk = self._busy.pop(connection)
                chunk.outcomes, chunk.notices = connection.recv()
            self._idle.append(connection)

    def _start(self) -> None:
        self._started = True
        encoder = pickle.dumps(self._encoder.silent())
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
                self._idle.append(here)
            for connection in self._idle:
                connection.send_bytes(encoder)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _chunks(records: Iterator[Raw]) -> Iterator[_Chunk]:
    chunk, size = list[Raw](), 0
    try:
        for raw in records:
            chunk.append(raw)
            size += _size(raw[1])
            if len(chunk) == CHUNK or size >= CHUNK_BYTES:
                yield _Chunk(chunk)
                chunk, size = [], 0
    except LogitcaskError as fault:
        yield _Chunk(chunk, fault)
        return
    if chunk:
        yield _Chunk(chunk)


def _size(record: object) -> int:
    """Return about how many characters a record has, by its strings and lists."""
    if isinstance(record, str | bytes):
        return len(record)
    if isinstance(record, dict):
        return sum(map(_size, record.values()))
    return sum(map(_size, record)) if isinstance(record, list) else 8


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise LogitcaskError(
            "a process that tokenizes ended or could not be started, perhaps for lack of memory: run the same command "
            "again, with --tokenize-workers 1 if it ends again"
        ) from error
