"""From the records of a data set to its token table: read, cut into chunks, encoded here or elsewhere, written."""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from logitcask.pipeline.console import say, track
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import Raw, read_records
from logitcask.pipeline.text.token_table import TokenTable, write_table
from logitcask.pipeline.text.tokens.chunks import Chunk, ChunkEncoder, cut_chunks
from logitcask.pipeline.text.tokens.log import TokenLog
from logitcask.pipeline.text.tokens.packed import PackedChunk
from logitcask.pipeline.text.tokens.workers import Pool, Promise, Workers

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
