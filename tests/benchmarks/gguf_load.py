"""How long a GGUF model takes to load: with its file parsed once, as here, and as transformers parses it.

Run as ``python -m tests.benchmarks.gguf_load``: a minute. Both ways give the same weights; they take turns.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from logitcask.pipeline.models.load import load_causal_lm
from tests.benchmarks.capture import teacher_path

ROUNDS = 3


def main() -> None:
    """Load by both ways in turn and print the processor time of each."""
    file, seconds = Path(teacher_path()), dict[str, list[float]]()
    theirs: Any = AutoModelForCausalLM.from_pretrained
    ways: dict[str, Callable[[], object]] = {
        "parsed once": lambda: load_causal_lm(str(file), dtype=torch.float32),
        "transformers alone": lambda: theirs(file.parent, gguf_file=file.name, dtype=torch.float32),
    }
    for _ in range(ROUNDS):
        for name, load in ways.items():
            began = time.process_time()
            load()
            seconds.setdefault(name, []).append(time.process_time() - began)
    for name, each in seconds.items():
        print(f"{name}: {median(each):.1f} s of processor time")


if __name__ == "__main__":
    main()
