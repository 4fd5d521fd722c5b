"""What a run of stage 2 will take, printed before it starts, and what to change if memory runs out."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.shapes import ModelShape
from logitcask.pipeline.models.student_memory import GB, Amount, student_memory
from logitcask.pipeline.runs.run_folder import latest_checkpoint

WORKER_ENDED = "DataLoader worker (pid"  # killed from outside, mostly by a system that ran out of memory


@dataclass(frozen=True)
class RunSize:
    """How much a run trains on."""

    data: Amount
    held_out: int  # examples
    batches: int  # per rank and epoch
    ranks: int
    accumulation: int
    epochs: float
    max_steps: int | None  # overrides epochs

    def steps(self) -> tuple[int, float]:
        """Optimizer steps of the run, and the epochs they are."""
        per_epoch = -(-self.batches // self.accumulation)
        steps = self.max_steps or math.ceil(self.epochs * per_epoch)
        return steps, steps / per_epoch


@dataclass(frozen=True)
class StepSize:
    """What decides the memory of an optimizer step, on one device."""

    student: ModelShape
    longest: int  # tokens of the longest example
    on_cpu: bool
    batch_size: int
    accumulation: int
    checkpointing: bool
    mixed: bool
    from_cache: bool

    def memory(self) -> float:
        """Bytes that a step takes at most, by estimate."""
        parts = student_memory(
            self.student,
            self.batch_size * self.longest,
            checkpointing=self.checkpointing,
            mixed=self.mixed,
            on_cpu=self.on_cpu,
        )
        return sum(parts.values())

    def savings(self) -> list[str]:
        """What lowers the memory of a step, with the present value and the GB it saves by estimate, most first."""
        now = self.memory()
        length = "--max-seq-length in stage 1" if self.from_cache else "--max-seq-length"
        fixed = student_memory(self.student, 0, checkpointing=False, mixed=self.mixed)
        smaller = f"a student smaller than {self.student.parameters:,} parameters, half"
        options = [(sum(fixed.values()) / 2, smaller)]
        if self.batch_size > 1:
            halved = (
                f"halve --batch-size from {self.batch_size} and double --gradient-accumulation-steps from "
                f"{self.accumulation}"
            )
            options.append((now - replace(self, batch_size=self.batch_size // 2).memory(), halved))
        if self.longest > 2:
            shorter = f"a smaller {length}, the longest example has {self.longest} tokens, half"
            options.append((now - replace(self, longest=self.longest // 2).memory(), shorter))
        if not self.checkpointing:
            options.append((now - replace(self, checkpointing=True).memory(), "--use-gradient-checkpointing"))
        if not self.mixed and not self.on_cpu:
            options.append((now - replace(self, mixed=True).memory(), "--use-mixed-precision"))
        useful = sorted((option for option in options if option[0] > 0), reverse=True)
        return [f"{words} (-{saved / GB:.2f} GB)" for saved, words in useful]


def summary(run: RunSize, step: StepSize, device: str, precision: str) -> list[str]:
    """What the run will do, for its log."""
    steps, epochs = run.steps()
    data = run.data
    examples = step.batch_size * step.accumulation * run.ranks
    positions = data.positions / data.examples
    trained = min(examples, data.examples - run.held_out)
    return [
        f"steps: {steps:,}, {epochs:,.2f} epochs",
        f"data: {data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} target positions; "
        f"held out: {run.held_out:,} examples, about {run.held_out * positions:,.0f} target positions",
        f"a step: {examples:,} examples (batch {step.batch_size} x accumulation {step.accumulation} x ranks "
        f"{run.ranks}), about {trained * positions:,.0f} target positions",
        f"device: {device}, {precision}; about {step.memory() / GB:.1f} GB by estimate",
    ]


@contextlib.contextmanager
def explain_memory(step: StepSize, output: Path, num_workers: int) -> Iterator[None]:
    """Turn out-of-memory errors into a LogitcaskError that names the settings that take the most."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if WORKER_ENDED in str(error):
            what = f"a process that reads batches was killed, as systems do if memory runs out ({first_line(error)})"
            first = f"fewer --num-workers than {num_workers}, each holds a shard; "
        elif out_of_memory(error):
            what, first = f"memory ran out ({first_line(error)})", ""
        else:
            raise
        checkpoint = latest_checkpoint(output)
        then = f"then resume with --resume-from-checkpoint {checkpoint}" if checkpoint else "then run the command again"
        raise LogitcaskError(
            f"{what}: a step takes about {step.memory() / GB:.2f} GB by estimate; what lowers it, most first: "
            f"{first}{'; '.join(step.savings())}; {then}"
        ) from error
