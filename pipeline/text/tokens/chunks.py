"""Chunks of records: what is encoded at once. They depend on the data alone, and what comes of them on the encoder."""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import Raw
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.text.tokens.packed import PackedChunk, pack

RECORDS, CHARACTERS = 256, 4 << 20  # a chunk ends when it has either


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
        packed = pack(encoded, self.max_seq_length)
        packed.bad, packed.notices = bad, encoder.notices
        return packed
