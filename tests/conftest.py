"""What holds for all tests, before any of their modules is imported.

Progress bars are silenced, as the command does for itself; Ray's workers, by default the last to be given a processor,
are not kept waiting by the tests beside them. Tests of many processes, which wait for each other much, come first: all
others run beside them.
"""

import os

import pytest

os.environ["TQDM_DISABLE"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, Ray reads it so

MANY_PROCESSES = ("test_ray", "test_ray_clusters", "test_ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in MANY_PROCESSES)
