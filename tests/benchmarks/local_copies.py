"""What keeping a local copy costs in a full folder: now, and if the folder were listed at every copy, as it once was.

Both in one run, in folders of the same number of copies of 1 kB. Run as ``python -m tests.benchmarks.local_copies``
(about two minutes).
"""

import hashlib
import random
import statistics
import tempfile
import time
from pathlib import Path

from logitcask.cache.storage.disk_cache import DiskCache

SIZE, PUTS = 1024, 400
HELD = (1_000, 10_000, 60_000)


def fill(place: Path, held: int) -> DiskCache:
    """Return a folder's local copies, full."""
    cache = DiskCache(place, held * SIZE)
    for index in range(held):
        put(cache, index)
    return cache


def put(cache: DiskCache, index: int) -> None:
    """Add one object."""
    data = random.Random(index).randbytes(SIZE)
    cache.put(hashlib.sha256(data).digest(), data)


def seconds_a_copy(cache: DiskCache, first: int, puts: int, *, listing: bool) -> float:
    """Return the mean time of a copy, listing the folder before each if ``listing``."""
    began = time.perf_counter()
    for index in range(first, first + puts):
        if listing:
            cache._room.left = 0
        put(cache, index)
    return (time.perf_counter() - began) / puts


def main() -> None:
    """Print the table."""
    print(f"copies of {SIZE} bytes; means of {PUTS} copies that list rarely, medians of 5 that list each time")
    for held in HELD:
        with tempfile.TemporaryDirectory() as place:
            cache = fill(Path(place), held)
            now = seconds_a_copy(cache, held, max(PUTS, held // 8), listing=False)
            before = statistics.median(seconds_a_copy(cache, 2 * held + i, 1, listing=True) for i in range(5))
        print(f"{held:7,} held   {now * 1e3:8.3f} ms   listing {before * 1e3:8.3f} ms   ratio {before / now:6.1f}")


if __name__ == "__main__":
    main()
