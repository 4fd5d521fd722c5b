"""What a kill or a power cut leaves of a folder: each write, removal and flush of this process can be the last."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from zarr.storage import LocalStore

KINDS = ("killed", "names kept", "names lost")


class Cut(Exception):
    """The power is cut."""


class Disk:
    """Records what is durable below a folder: contents of flushed files, names in flushed folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.steps, self._last = root, 0, 0
        self._data: dict[str, bytes] = {}
        self._names: dict[str, set[str]] = {}

    @contextmanager
    def cut_after(self, steps: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Let everything that is there be durable, and raise Cut in place of the step after so many."""
        self.steps, self._last = 0, steps
        for place in (self.root, *self.root.rglob("*")):
            self._flushed(place)
        fsync, put, remove = os.fsync, LocalStore.set, LocalStore.delete

        def flush(handle: int) -> None:
            self._step()
            fsync(handle)
            self._flushed(Path(os.readlink(f"/proc/self/fd/{handle}")))

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            async def one(*given: Any, **named: Any) -> None:
                self._step()
                await method(*given, **named)

            return one

        with patch.context() as patched:
            patched.setattr(os, "fsync", flush)
            patched.setattr(LocalStore, "set", counted(put))
            patched.setattr(LocalStore, "delete", counted(remove))
            yield

    def _step(self) -> None:
        if self.steps == self._last:
            raise Cut
        self.steps += 1

    def _flushed(self, place: Path) -> None:
        if place.is_dir():
            self._names[str(place)] = set(os.listdir(place))
        elif place.is_file():
            self._data[str(place)] = place.read_bytes()

    def left(self, kind: str, target: Path) -> Path:
        """Write what is left to ``target``, in one of ``KINDS`` of bad luck."""
        if kind == "killed":
            shutil.copytree(self.root, target)
            return target
        target.mkdir()
        self._copy(self.root, target, kind)
        return target

    def _copy(self, folder: Path, target: Path, kind: str) -> None:
        durable = self._names.get(str(folder), set())
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        for name in durable if kind == "names lost" else present | durable:
            place = folder / name
            if str(place) in self._names or place.is_dir():
                (target / name).mkdir()
                self._copy(place, target / name, kind)
                continue
            flushed = self._data.get(str(place), b"")
            same = not place.is_file() or place.read_bytes() == flushed
            (target / name).write_bytes(flushed if same or kind == "names lost" else b"")
