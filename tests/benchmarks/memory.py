"""Peak memory of both stages on 1x and 10x data: it must not grow with the data.

A tiny random teacher and student, a process a measurement. Run as ``python -m tests.benchmarks.memory`` (about four
minutes on two cores).
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (2_000, 20_000)
STEPS = 100


def stage_1(folder: Path, examples: int) -> None:
    """Label so many examples of 64 words."""
    from pipeline.precompute import precompute
    from pipeline.settings import PrecomputeSettings
    from tests.tiny import make_teacher

    data = folder / "data.jsonl"
    with data.open("w") as lines:
        for index in range(examples):
            lines.write(json.dumps({"text": " ".join(f"w{(index * 31 + i * 7) % 997}" for i in range(24))}) + "\n")
    precompute(
        PrecomputeSettings.model_validate(
            {
                "teacher_model": str(make_teacher(folder)),
                "train_data": str(data),
                "output": folder / "cache",
                "max_seq_length": 64,
                "shard_positions": 16_384,
            }
        )
    )


def stage_2(folder: Path, examples: int) -> None:
    """Train some steps from the cache of so many examples; reads from every shard."""
    from cache.reader import CacheReader
    from pipeline.train import run_training
    from tests.runs import train_settings

    assert len(CacheReader(folder / "cache")) == examples
    run_training(
        train_settings(folder / "cache", folder / "run", max_steps=STEPS, batch_size=8, eval_fraction=0.001, epochs=1)
    )


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        {"1": stage_1, "2": stage_2}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    found: dict[tuple[str, int], int] = {}
    for examples in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for stage in ("1", "2"):
                command = [sys.executable, "-m", "tests.benchmarks.memory", stage, folder, str(examples)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[stage, examples] = int(said.split("peak ")[-1])
    for stage in ("1", "2"):
        few, many = (found[stage, size] for size in SIZES)
        print(f"stage {stage}: {SIZES[0]} examples {few} MiB, {SIZES[1]} examples {many} MiB, ratio {many / few:.2f}")


if __name__ == "__main__":
    main()
