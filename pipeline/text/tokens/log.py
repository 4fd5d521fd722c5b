"""The file of a token table, and a ledger by which the next run continues it after a kill."""

import contextlib
import datetime
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from logitcask.cache.storage.staging import LEDGER
from logitcask.pipeline.text.bad_records import Notices
from logitcask.pipeline.text.tokens.packed import PackedChunk, unpack_sizes

LISTED = ("key", "truncated", "dropped", "metadata", "kinds", "bad")  # in a line of the ledger, as they are
COMMIT_CHUNKS, COMMIT_BYTES = 64, 64 << 20  # a piece is durable when it has either


class TokenLog:
    """Writes packed chunks one after another to ``folder``; what is written of ``key``'s earlier run is taken from it.

    A piece is many chunks: its bytes are flushed to the disk, then a line per chunk is appended to the ledger, with the
    digests of its records and its bytes. The next run reads its data again and takes the chunks of which both are
    the same, up to the first that differs; there it cuts the file. Without a key there is no ledger, nor for less than
    a piece.
    """

    def __init__(self, folder: Path, key: str | None = None, day: datetime.date = datetime.date.min) -> None:
        self.file, self._ledger = folder / "tokens", folder / LEDGER
        self.day = day  # on which the tokens were begun
        self._key, self._lines, self._bytes = key, list[bytes](), 0
        self._size, self._ledger_size = 0, 0  # of what is taken of the earlier run
        self._earlier = self._open_earlier()
        if self._earlier is None:
            self._ledger.unlink(missing_ok=True)
        self._out = self.file.open("wb" if self._earlier is None else "r+b")
        self._at_end = self._earlier is None

    def known(self, key: str | None) -> PackedChunk | None:
        """Return what came of the records with a digest in the earlier run, if known. Ask for all chunks, in order."""
        if self._earlier is None:
            return None
        tokens, ledger = self._earlier
        try:
            line = ledger.readline()
            entry = json.loads(line)
            data = tokens.read(entry["bytes"])
            if not line.endswith(b"\n") or key is None:
                raise ValueError
            if (key, hashlib.sha256(data).hexdigest()) != (entry["key"], entry["sha256"]):
                raise ValueError
            chunk = PackedChunk(data, *unpack_sizes(data), **{name: entry[name] for name in LISTED}, stored=True)
            chunk.notices = Notices(**entry["notices"])
        except (OSError, ValueError, KeyError, TypeError):  # torn, damaged, or of other data
            self._close_earlier()
            return None
        self._ledger_size += len(line)
        return chunk

    def write(self, packed: PackedChunk) -> None:
        """Write the next chunk, unless the earlier run did."""
        if packed.stored:
            self._size += len(packed.tokens)
            return
        self._cut()
        self._out.write(packed.tokens)
        if self._key is None:
            return
        entry = {
            "bytes": len(packed.tokens),
            "sha256": hashlib.sha256(packed.tokens).hexdigest(),
            **{name: getattr(packed, name) for name in LISTED},
            "notices": vars(packed.notices),
        }
        self._lines.append(json.dumps(entry).encode() + b"\n")
        self._bytes += len(packed.tokens)
        if len(self._lines) >= COMMIT_CHUNKS or self._bytes >= COMMIT_BYTES:
            self._commit()

    def flush(self) -> None:
        """Let the file be read."""
        self._cut()
        self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the file; its last piece is made durable too, if there is a ledger."""
        with self._out, contextlib.suppress(OSError) if error else contextlib.nullcontext():
            if error is None:
                self._cut()
            if self._lines and self._ledger.exists():
                self._commit()
        self._close_earlier()

    def _open_earlier(self) -> tuple[IO[bytes], IO[bytes]] | None:
        """Return the open file and ledger of an earlier run with the same key, whose day is taken."""
        if self._key is None:
            return None
        try:
            tokens, ledger = self.file.open("rb"), self._ledger.open("rb")
            line = ledger.readline()
            header = json.loads(line)
            if header["key"] != self._key:
                return None
            self.day, self._ledger_size = datetime.date.fromisoformat(header["day"]), len(line)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return tokens, ledger

    def _close_earlier(self) -> None:
        for file in self._earlier or ():
            file.close()
        self._earlier = None

    def _cut(self) -> None:
        """Remove what is not taken of the earlier run."""
        if not self._at_end:
            self._at_end = True
            os.truncate(self._ledger, self._ledger_size)
            self._out.truncate(self._size)
            self._out.seek(self._size)

    def _commit(self) -> None:
        self._out.flush()
        os.fsync(self._out.fileno())
        with self._ledger.open("ab") as ledger:
            if not ledger.tell():
                header = {"key": self._key, "day": self.day.isoformat()}
                ledger.write(json.dumps(header).encode() + b"\n")
            ledger.write(b"".join(self._lines))
            ledger.flush()
            os.fsync(ledger.fileno())
        self._lines, self._bytes = [], 0
