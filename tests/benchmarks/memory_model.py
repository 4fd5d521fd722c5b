"""The plan's memory of stage 2 against what training takes: students of configs/ on the CPU, two optimizer steps each,
of two passes, so that gradients are there already when the second pass begins.

Run as ``python -m tests.benchmarks.memory_model`` (about three minutes on two cores). Each case is a process of its
own; measured is the growth of its peak resident memory from before the student is made.
"""

import resource
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.models.shapes import shape_of_student, student_memory
from logitcask.pipeline.plan.estimates import MEASURED_VOCABULARY
from logitcask.pipeline.train.loss import make_loss_forward

# config, examples per batch, tokens per example, gradient checkpointing, mixed precision
CASES = [
    ("tiny", 8, 256, False, False),
    ("tiny", 8, 256, True, False),
    ("tiny", 4, 128, False, True),
    ("100m", 1, 128, False, False),
    ("100m", 4, 256, False, False),
    ("100m", 4, 256, True, False),
]
ENTRIES = 32  # per label


def config_path(name: str) -> Path:
    """Return the config file of a student."""
    return Path(f"configs/students/{name}.json")


def resident() -> int:
    """Return the largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, examples: int, length: int, checkpointing: bool, mixed: bool) -> int:
    """Return the bytes by which two steps raise this process's peak."""
    torch.ones(64, 64).matmul(torch.ones(64, 64))
    before = resident()
    model = student_from_config(config_path(name), MEASURED_VOCABULARY)
    make_loss_forward(model, LossSettings(0.5, 2.0, "sampled", "forward-kl"))
    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        keep_products_only(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.train()
    count = examples * length
    for number in range(4):
        batch = {
            "input_ids": torch.randint(0, MEASURED_VOCABULARY, (examples, length)),
            "target_index": torch.arange(count),
            "gold": torch.randint(0, MEASURED_VOCABULARY, (count,)),
            "soft_labels": SoftLabels(
                torch.randint(0, MEASURED_VOCABULARY, (count, ENTRIES)),
                torch.full((count, ENTRIES), 1 / ENTRIES),
                torch.full((count, ENTRIES), -4.0),
                torch.full((count,), -2.0),
                8,
            ),
        }
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = model(**batch).total / count
        loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return resident() - before


def main() -> None:
    """Print the table or, with arguments, measure one case."""
    if len(sys.argv) > 1:
        print(measure(*CASES[int(sys.argv[1])]))
        return
    table = Table("student", "batch", "length", "checkpointing", "precision", "predicted, MB", "measured, MB", "ratio")
    for number, (name, examples, length, checkpointing, mixed) in enumerate(CASES):
        command = [sys.executable, "-m", "tests.benchmarks.memory_model", str(number)]
        measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        shape = shape_of_student(config_path(name), MEASURED_VOCABULARY)
        parts = student_memory(shape, examples * length, checkpointing=checkpointing, mixed=mixed, on_cpu=True)
        predicted = sum(parts.values())
        kind = "bf16 mixed" if mixed else "float32"
        words = [name, str(examples), str(length), "yes" if checkpointing else "no", kind]
        table.add_row(*words, f"{predicted / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{predicted / measured:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
