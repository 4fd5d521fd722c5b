"""What holds for all tests, before any of their modules is imported.

Their folders lie in memory if there is room: on a disk half of the time that a tiny cache takes is waiting for it.
Hypothesis draws the same cases in every check, new ones each night.
Progress bars are silenced, as the command does for itself; Ray's workers, by default the last to be given a processor,
are not kept waiting by the tests beside them. Tests of many processes wait for each other much: they are dealt out and
come first, so that each of the four workers of the test command begins with some and all others run beside them.
"""

import gc
import os
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.forked import forks
from tests.support.nightly import nightly

settings.register_profile("check", derandomize=not nightly())
settings.load_profile("check")

os.environ["TQDM_DISABLE"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, Ray reads it so

IN_MEMORY, ROOM = Path("/dev/shm"), 4 << 30  # bytes
if os.access(IN_MEMORY, os.W_OK):
    place = os.statvfs(IN_MEMORY)
    if place.f_bavail * place.f_frsize >= ROOM and not place.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))

MANY_PROCESSES = (
    ("test_ray", "test_ray_clusters"),
    ("test_ranks", "test_network_folder"),
    ("test_integrity", "test_packaging"),
    ("test_workers", "test_disk", "test_ownership"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put one group of `MANY_PROCESSES` before each of the equal stretches that xdist deals to its workers."""
    first = [[item for item in items if item.path.stem in stems] for stems in MANY_PROCESSES]
    rest = [item for item in items if item.path.stem not in sum(MANY_PROCESSES, ())]
    dealt: list[pytest.Item] = []
    for number, group in enumerate(first):
        stretch = (len(items) - len(dealt)) // (len(first) - number)
        others = max(0, stretch - len(group))
        dealt += group + rest[:others]
        del rest[:others]
    items[:] = dealt + rest


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection: a Trainer collects at its end, half a second each.

    A worker of the test command starts the process that others are forked from, before a loader starts it with less.
    """
    gc.collect()
    gc.freeze()
    forks()
    if "PYTEST_XDIST_WORKER" in os.environ:
        forkserver.ensure_running()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape half surrogate pairs in what was captured: pytest-xdist's workers cannot send them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
