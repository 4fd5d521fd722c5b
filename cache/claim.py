"""The right to write a cache on another machine, where no file can be locked: objects beside it, renewed by the living.

A run writes a claim of its own, then looks for those of others. A listing shows what was written before it (S3, Google
Cloud Storage, SFTP), so of two runs that begin at once at least one sees the other. A killed run's claim is renewed no
more: who finds one waits that long, and removes it.
"""

import contextlib
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.remote import RemoteStore
from logitcask.cache.store import delete_objects, write_objects

RENEWED, LOST = 10.0, 30.0  # seconds: between renewals; without one, until a run is taken for dead
WHOLE = "all"


@contextlib.contextmanager
def claimed(url: str, part: tuple[int, int] | None, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the right to write the cache at a URL, or a part of its shards while other runs write other parts.

    Raises LogitcaskError where a living run holds it. The Hugging Face hub, which allows few commits an hour, and a
    cache that is a whole bucket have no claims: there nothing refuses two runs at once, which write the same objects.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if url.startswith("hf:") or parent.endswith("/"):
        yield
        return
    prefix = f".{name}.run-"
    mine = f"{prefix}{WHOLE if part is None else f'{part[0]}-of-{part[1]}'}-{uuid.uuid4().hex}"
    hasty = RemoteStore(parent, read_only=False, tries=1)  # where a renewal fails, the next may not
    store, stop = RemoteStore(parent, read_only=False), threading.Event()
    write_objects(store, {mine: b"0"})
    renewal = threading.Thread(target=_renew, args=(hasty, mine, stop), daemon=True)
    renewal.start()
    try:
        _outlive(store, url, _others(store, prefix, mine), tell)
        yield
    finally:
        stop.set()
        renewal.join()
        with contextlib.suppress(LogitcaskError):
            delete_objects(hasty, [mine])


def _read(store: RemoteStore, name: str) -> bytes | None:
    found = sync(store.get(name, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def _renew(store: RemoteStore, name: str, stop: threading.Event) -> None:
    for renewals in itertools.count(1):  # the first at once: to connect may take long
        with contextlib.suppress(LogitcaskError):
            write_objects(store, {name: str(renewals).encode()})
        if stop.wait(RENEWED):
            return


def _others(store: RemoteStore, prefix: str, mine: str) -> list[str]:
    """Claims that one's own cannot stand beside."""

    async def names() -> list[str]:
        return [name async for name in store.list_dir("") if name.startswith(prefix) and not name.startswith(mine)]

    return [name for name in sync(names()) if not _side_by_side(name.removeprefix(prefix), mine.removeprefix(prefix))]


def _side_by_side(one: str, other: str) -> bool:
    """Whether two claims are of different parts of as many."""
    (part, _, _), (another, _, _) = one.rpartition("-"), other.rpartition("-")
    return WHOLE not in (part, another) and part != another and part.split("-")[-1] == another.split("-")[-1]


def _outlive(store: RemoteStore, url: str, claims: list[str], tell: Callable[[str], None]) -> None:
    """Wait until claims are withdrawn or given up for lost. Raises LogitcaskError where one is renewed."""
    seen = {name: content for name in claims if (content := _read(store, name)) is not None}
    if seen:
        tell(f"{url}: another run has begun to write this cache; without a sign of it for {LOST:g} s, this one goes on")
    until = time.monotonic() + LOST
    while seen and time.monotonic() < until:
        time.sleep(RENEWED / 10)
        now = {name: _read(store, name) for name in seen}
        if any(content not in (None, seen[name]) for name, content in now.items()):
            raise LogitcaskError(f"{url}: another run is writing this cache: wait for it or stop it")
        seen = {name: content for name, content in now.items() if content is not None}
    delete_objects(store, list(seen))
