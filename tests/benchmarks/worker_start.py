"""What starting a loader's workers takes: forks of one process that has done their imports, against one process each.

Run as ``python -m tests.benchmarks.worker_start CACHE [WORKERS]``; a minute. Prints the seconds to the first batch, and
the memory of all workers and what they are forked from (PSS: what is shared counts once).
"""

import argparse
import json
import multiprocessing
import time
from multiprocessing.context import BaseContext
from pathlib import Path

import logitcask as lc
from logitcask.pipeline.machine import worker_processes


def descendants(parent: int) -> list[int]:
    """Return the processes below one."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(file.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(file.parent.name))
        except OSError:  # it has ended
            continue
    return found + [each for child in found for each in descendants(child)]


def pss(process: int) -> int:
    """Return a process's proportional set size in MiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) // 1024


def measure(cache: Path, context: BaseContext | None, workers: int) -> dict[str, float]:
    """Return what one loader's start takes."""
    loader = lc.loader(lc.open(cache), 4, num_workers=workers)
    loader._loader.multiprocessing_context = context
    began = time.perf_counter()
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - began
    memory = sum(map(pss, descendants(multiprocessing.current_process().pid or 0)))
    return {"seconds to the first batch": round(seconds, 1), "MiB": memory}


def main() -> None:
    """Measure both, the slower one first, and print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("workers", type=int, nargs="?", default=4)
    given = parser.parse_args()
    for name in ("spawn", "forks"):
        context = multiprocessing.get_context("spawn") if name == "spawn" else worker_processes(given.workers)
        print(json.dumps({"workers": given.workers, "how": name, **measure(given.cache, context, given.workers)}))


if __name__ == "__main__":
    main()
