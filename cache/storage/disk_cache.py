"""A folder of bounded size that keeps what was read of a cache on another machine."""

import contextlib
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

_putting = threading.Lock()  # a shard's objects come at the same time, and room is made for one


@dataclass(frozen=True)
class DiskCache:
    """Objects named by their SHA-256, ``limit`` bytes in all at most: those used least recently go first.

    Whoever takes an object proves it by its digest, so nothing in the folder is trusted. Processes may share it.
    """

    folder: Path
    limit: int

    def get(self, digest: bytes, most: int) -> bytes | None:
        """The object kept under a digest, unproved; None where there is none of ``most`` bytes or fewer."""
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
        """Keep an object, dropping old ones for it. A folder that cannot be written keeps nothing more."""
        if len(data) > self.limit:
            return
        partial = self.folder / f"{digest.hex()}.{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _putting:
                self._make_room(len(data))
                partial.write_bytes(data)
                partial.replace(self.folder / digest.hex())
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _make_room(self, size: int) -> None:
        found = []
        for entry in os.scandir(self.folder):
            try:
                found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            except FileNotFoundError:  # another process dropped it
                continue
        total = sum(held for _, held, _ in found)
        for _, held, path in sorted(found):
            if total + size <= self.limit:
                return
            Path(path).unlink(missing_ok=True)
            total -= held
