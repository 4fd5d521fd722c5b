"""From the records of a data set to its token table: read, cut into chunks, encoded here or elsewhere, written.

Chunks depend on the data alone, and what comes of a chunk on its records and the encoder alone.
"""

import contextlib
import hashlib
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import say, track
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder, Finished
from logitcask.pipeline.text.records import Raw, read_records
from logitcask.pipeline.text.token_table import TokenTable, write_table
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.text.tokens.log import TokenLog
from logitcask.pipeline.text.tokens.packed import PackedChunk
from logitcask.pipeline.text.tokens.workers import Pool, Promise, Workers

RECORDS, CHARACTERS = 256, 4 << 20  # a chunk ends when it has either
ALONE = 4096  # records that are encoded here before workers are started, which takes seconds


def stage_tokens(
    encoder: Encoder,
    sources: tuple[str, ...],
    folder: Path,
    *,
    bad: BadRecords,
    max_seq_length: int,
    records: Callable[[str], Iterator[Raw]] = lambda source: read_records([source]),
    workers: Workers | None = None,
    resumable: bool = False,
) -> TokenTable:
    """Write every example of every source to ``folder``, in order, truncated to ``max_seq_length`` tokens.

    An example without a target after truncation is dropped; the identity counts both. The table, and what ``encoder``
    finds out, are the same whatever the ``workers``. If ``resumable``, a later run in the same folder takes what this
    one had written when it was killed, and its day. Raises LogitcaskError at the end if there are more bad records than
    ``bad`` allows, or no example remains.
    """
    key = encoder.key() if resumable else None
    with TokenLog(folder, key and hashlib.sha256(f"{key} {max_seq_length}".encode()).hexdigest(), encoder.day) as log:
        encoder.day = log.day
        encode = ChunkEncoder(encoder.silent(), max_seq_length)
        with workers(encode) if workers and encoder.is_portable else contextlib.nullcontext() as pool, bad:
            feed = _Feed(encode, log, pool)
            return write_table(
                _packed(encoder, sources, bad, records, feed),
                log,
                max_seq_length=max_seq_length,
                prompt_loss=encoder.prompt_loss,
                source=", ".join(sources),
            )


def _packed(
    encoder: Encoder, sources: tuple[str, ...], bad: BadRecords, records: Callable[[str], Iterator[Raw]], feed: "_Feed"
) -> Iterator[PackedChunk]:
    """Yield what comes of each chunk of the sources, under a progress bar for each source; collect the rest."""
    for source in sources:
        with track(f"reading {source}", None, "examples") as advance:
            for chunk, packed in feed.encode(cut_chunks(records(source))):
                encoder.take(packed.notices)
                bad.read += len(chunk.records)
                for index, reason in packed.bad:
                    where, record = chunk.records[index]
                    bad.add(where, reason, record.value if isinstance(record, RecordError) else record)
                yield packed
                advance(len(packed.lengths))
    if chats := encoder.notices.chats():
        say(chats)
    if bad.count == bad.read:  # there is no example, and this is why
        bad.settle()


@dataclass(frozen=True)
class Chunk:
    """Records that follow each other in a source."""

    records: list[Raw]
    message: bytes | None  # the records, pickled; None if they cannot be: a data set may hold what no process can take
    key: str | None  # the digest of that
    fault: LogitcaskError | None = None  # why no record follows these


def cut_chunks(records: Iterator[Raw]) -> Iterator[Chunk]:
    """Yield records in chunks; an error of reading comes with the records before it."""
    raw, size, fault = list[Raw](), 0, None
    try:
        for each in records:
            raw.append(each)
            size += _size(each[1])
            if len(raw) == RECORDS or size >= CHARACTERS:
                yield _chunk(raw)
                raw, size = [], 0
    except LogitcaskError as error:
        fault = error
    if raw or fault:
        yield _chunk(raw, fault)


def _chunk(raw: list[Raw], fault: LogitcaskError | None = None) -> Chunk:
    try:
        message = pickle.dumps([record for _, record in raw])
    except Exception:  # what a record holds may raise anything
        return Chunk(raw, None, None, fault)
    return Chunk(raw, message, hashlib.sha256(message).hexdigest(), fault)


def _size(record: object) -> int:
    """Return about how many characters a record has, by its strings and lists."""
    if isinstance(record, str | bytes):
        return len(record)
    if isinstance(record, dict):
        return sum(map(_size, record.values()))
    return sum(map(_size, record)) if isinstance(record, list) else 8


@dataclass(frozen=True)
class ChunkEncoder:
    """Encodes the records of chunks, in this process or another, and truncates their examples."""

    encoder: Encoder
    max_seq_length: int

    def __call__(self, message: bytes) -> PackedChunk:
        """Return what comes of pickled records."""
        return self.encode(pickle.loads(message))  # noqa: S301 - of this run's own process

    def encode(self, records: Sequence[dict[str, Any] | RecordError]) -> PackedChunk:
        """Return what comes of records, notices included."""
        encoder, encoded, bad = self.encoder.silent(), list[Encoded](), list[tuple[int, str]]()
        for index, record in enumerate(records):
            outcome = encoder.outcome(record)
            if isinstance(outcome, str):
                bad.append((index, outcome))
            else:
                encoded += outcome
        packed = pack(encoded, self.max_seq_length, encoder.finish)
        packed.bad, packed.notices = bad, encoder.notices
        return packed


def pack(
    examples: Iterable[Encoded], max_seq_length: int, finish: Callable[[Encoded], Finished] | None = None
) -> PackedChunk:
    """Return examples truncated to ``max_seq_length`` tokens, without those that then have no target.

    ``finish`` gets those that come with the same in the teacher's vocabulary, truncated too.
    """
    packed, parts = PackedChunk(), list[bytes]()
    for example in examples:
        kept = example.truncated(max_seq_length)
        packed.truncated += kept is not example
        if kept.other is not None:
            assert finish is not None, "an encoder for two vocabularies finishes its examples"
            kept, kinds = finish(replace(kept, other=kept.other.truncated(max_seq_length)))
            packed.kinds = [sum(counts) for counts in zip(packed.kinds, kinds, strict=True)]
        positions = int(np.count_nonzero(kept.target_mask))
        if not positions:
            packed.dropped += 1
            continue
        if kept.metadata:
            packed.metadata.append((len(packed.lengths), dict(kept.metadata)))
        packed.lengths.append(len(kept.input_ids))
        packed.positions.append(positions)
        packed.companions.append(len(kept.companion))
        parts += [size.to_bytes(4, "little") for size in (len(kept.input_ids), len(kept.companion))]
        parts += [kept.input_ids.astype("<u4").tobytes(), kept.target_mask.tobytes(), kept.companion]
    packed.tokens = b"".join(parts)
    return packed


class _Feed:
    """Encodes chunks in order: those that are written already not again, the first few and unpicklable ones here."""

    def __init__(self, encode: ChunkEncoder, log: TokenLog, pool: Pool | None) -> None:
        self._encode, self._log, self._pool = encode, log, pool
        self._alone = 0  # records that were encoded here

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, PackedChunk]]:
        """Yield each chunk with what comes of it; raise the error of reading that ended the last."""
        queue, fault = deque[tuple[Chunk, Promise]](), None
        for chunk in chunks:
            fault = chunk.fault
            queue.append((chunk, self._begin(chunk)))
            if len(queue) > (self._pool.depth if self._pool else 0):
                yield self._finish(*queue.popleft())
        while queue:
            yield self._finish(*queue.popleft())
        if fault:
            raise fault

    def _begin(self, chunk: Chunk) -> Promise:
        if (known := self._log.known(chunk.key)) is not None:
            return lambda: known
        if self._pool is None or chunk.message is None or self._alone < ALONE:
            self._alone += len(chunk.records)
            return partial(self._encode.encode, [record for _, record in chunk.records])
        return self._pool.submit(chunk.message)

    @staticmethod
    def _finish(chunk: Chunk, promise: Promise) -> tuple[Chunk, PackedChunk]:
        packed = promise()
        packed.key = chunk.key
        return chunk, packed
