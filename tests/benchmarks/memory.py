"""Peak memory and time of both stages on 1x and 10x data: memory must not grow with the data, time in proportion.

A tiny random teacher and student, one pass over the data, a process per measurement; the seconds are those of the stage
without Python's imports. The peak is printed after a tenth, a half and all of the time, to separate the heap's growth
in its first minute from growth with the data. Run as ``python -m tests.benchmarks.memory``; six minutes on two cores.
"""

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

SIZES = (2_000, 20_000)


def stage_1(folder: Path, examples: int) -> float:
    """Label ``examples`` examples of 24 words and return the seconds it took."""
    from logitcask.pipeline.precompute.precompute import precompute
    from logitcask.pipeline.settings.precompute import PrecomputeSettings
    from tests.support.tiny import make_teacher

    data = folder / "data.jsonl"
    with data.open("w") as lines:
        for index in range(examples):
            lines.write(json.dumps({"text": " ".join(f"w{(index * 31 + i * 7) % 997}" for i in range(24))}) + "\n")
    settings = PrecomputeSettings.model_validate(
        {
            "teacher_model": str(make_teacher(folder)),
            "train_data": str(data),
            "output": folder / "cache",
            "max_seq_length": 64,
            "shard_positions": 16_384,
        }
    )
    began = time.perf_counter()
    precompute(settings)
    return time.perf_counter() - began


def stage_2(folder: Path, examples: int) -> float:
    """Train one epoch on the cache of ``examples`` examples and return the seconds it took."""
    from logitcask.cache.reader import CacheReader
    from logitcask.pipeline.train.train import run_training
    from tests.support.runs import train_settings

    assert len(CacheReader(folder / "cache")) == examples
    settings = train_settings(
        folder / "cache", folder / "run", max_steps=None, batch_size=16, eval_fraction=0.001, epochs=1, logging_steps=50
    )
    began = time.perf_counter()
    run_training(settings)
    return time.perf_counter() - began


def peak() -> int:
    """Return the peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(stage: Callable[[Path, int], float], folder: Path, examples: int) -> None:
    """Print the stage's peaks and seconds."""
    peaks, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks.append(peak())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = stage(folder, examples)
    done.set()
    watcher.join()
    print("found", peaks[len(peaks) // 10], peaks[len(peaks) // 2], peak(), seconds)


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        measure({"1": stage_1, "2": stage_2}[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))
        return
    found: dict[tuple[str, int], list[float]] = {}
    for examples in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for stage in ("1", "2"):
                command = [sys.executable, "-m", "tests.benchmarks.memory", stage, folder, str(examples)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[stage, examples] = [float(value) for value in said.split("found ")[-1].split()]
    for stage in ("1", "2"):
        few, many = (found[stage, size] for size in SIZES)
        for what, at in (("MiB", 2), ("s", 3)):
            print(
                f"stage {stage}: {SIZES[0]} examples {few[at]:.1f} {what}, {SIZES[1]} {many[at]:.1f}, "
                f"ratio {many[at] / few[at]:.2f}"
            )
        print(f"stage {stage}: {SIZES[1]} examples, after a tenth, a half and all: {many[0]}, {many[1]}, {many[2]} MiB")


if __name__ == "__main__":
    main()
