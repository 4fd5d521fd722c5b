"""A folder of bounded size that holds local copies of objects read from a remote cache."""

import contextlib
import os
import re
import stat
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

OWN_FOLDER = "logitcask-local-copies"  # inside the user's folder, which may hold anything
MARK = "CACHEDIR.TAG"  # as of bford.info/cachedir: backups skip such a folder
MARK_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Copies of objects of logit caches, made by Logitcask.\n"
OBJECT = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{32}\.partial)?")
SLACK = 16  # the part of the limit that is freed at once: then the folder need not be measured for a while

_put_lock = threading.Lock()  # objects of a shard arrive at the same time, and room is made for one at a time


@dataclass
class _Room:
    """What one process may still add to a folder until it measures it again, in bytes."""

    left: int = 0


@dataclass(frozen=True)
class DiskCache:
    """Objects named by their SHA-256, at most ``limit`` bytes in total; the least recently used are dropped first.

    They lie in a marked folder inside ``place``; nothing else is read, written or removed. The folder is not trusted:
    callers of ``get`` check the object against its digest. Processes may share a folder: each after the first may then
    exceed the limit by a sixteenth, since each measures the folder only once per sixteenth of the limit that it adds.
    """

    place: Path
    limit: int
    _room: _Room = field(default_factory=_Room, init=False, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """The folder of the objects."""
        return self.place / OWN_FOLDER

    def is_foreign(self) -> bool:
        """Return whether something of the folder's name is there that this program did not make."""
        if self.folder.is_symlink():
            return True
        try:
            names = os.listdir(self.folder)
        except OSError:
            return self.folder.is_file()
        return bool(names) and MARK not in names

    def get(self, digest: bytes, most: int) -> bytes | None:
        """Return the object stored under a digest, unchecked; None if there is none of at most ``most`` bytes."""
        place = self.folder / digest.hex()
        try:
            status = os.lstat(place)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
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
            with _put_lock:
                self._make_room(len(data))
                partial.write_bytes(data)
                partial.replace(self.folder / digest.hex())
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _make_room(self, size: int) -> None:
        if size <= self._room.left:
            self._room.left -= size
            return
        self._make_folder()
        entries, spare = sorted(_objects(self.folder)), self.limit // SLACK
        total = sum(bytes_held for _, bytes_held, _ in entries)
        for _, bytes_held, path in entries:
            if total + size + spare <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= bytes_held
        self._room.left = spare

    def _make_folder(self) -> None:
        """Make and mark the folder. Raises FileExistsError if it is not ours."""
        self.place.mkdir(parents=True, exist_ok=True)
        if self.is_foreign():
            raise FileExistsError(self.folder)
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / MARK).exists():
            (self.folder / MARK).write_text(MARK_TEXT)


def _objects(folder: Path) -> list[tuple[int, int, str]]:
    """Return the time of the last use, the size in bytes and the path of each object, whole or partial."""
    entries = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process dropped it
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and OBJECT.fullmatch(entry.name):
                entries.append((status.st_mtime_ns, status.st_size, entry.path))
    return entries
