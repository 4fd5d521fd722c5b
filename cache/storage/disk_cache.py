"""A folder of bounded size that holds local copies of objects read from a remote cache."""

import contextlib
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

_put_lock = threading.Lock()  # objects of a shard arrive at the same time, and room is made for one at a time


@dataclass(frozen=True)
class DiskCache:
    """Objects named by their SHA-256, at most ``limit`` bytes in total; the least recently used are dropped first.

    The folder is not trusted: callers of ``get`` check the object against its digest. Processes may share a folder.
    """

    folder: Path
    limit: int

    def get(self, digest: bytes, most: int) -> bytes | None:
        """Return the object stored under a digest, unchecked; None if there is none of at most ``most`` bytes."""
        place = self.folder / digest.hex()
        try:
            if place.stat().st_size > most:
                return None
            data = place.read_bytes()
            os.utime(place)
        except OSError:
            return None
        return data

    def put(self, digest: bytes, data: bytes) -> None:
        """Store an object, dropping old ones to make room. If the folder cannot be written, do nothing."""
        if len(data) > self.limit:
            return
        partial = self.folder / f"{digest.hex()}.{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _put_lock:
                self._make_room(len(data))
                partial.write_bytes(data)
                partial.replace(self.folder / digest.hex())
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _make_room(self, size: int) -> None:
        entries = []
        for entry in os.scandir(self.folder):
            try:
                entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            except FileNotFoundError:  # another process dropped it
                continue
        total = sum(bytes_held for _, bytes_held, _ in entries)
        for _, bytes_held, path in sorted(entries):
            if total + size <= self.limit:
                return
            Path(path).unlink(missing_ok=True)
            total -= bytes_held
