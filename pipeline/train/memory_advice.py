"""What a run of stage 2 needs, printed before it starts, and what to change if memory runs out."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.pipeline.batches.mixture import Mixture
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.shapes import GB, Amount, ModelShape, student_memory
from logitcask.pipeline.runs.run_folder import latest_checkpoint

EVALUATIONS = 10  # of a run that names no --eval-steps
EVALUATED_SHARE = 0.6  # most positions evaluated per position trained on, which takes three times as long
WORKER_ENDED = "DataLoader worker (pid"  # killed from outside, usually by a system out of memory


@dataclass(frozen=True)
class RunSize:
    """How much a run trains on."""

    data: Amount
    held_out: int  # examples
    held_out_positions: float
    batches: int  # per rank and epoch
    examples: int  # per epoch, on all ranks
    positions: float  # target positions of those
    ranks: int
    accumulation: int
    epochs: float
    max_steps: int | None  # overrides epochs

    def steps(self) -> tuple[int, float]:
        """Return the optimizer steps of the run, as the Trainer counts them, and the epochs that they amount to."""
        per_epoch = max(1, -(-self.batches // self.accumulation))
        steps = self.max_steps or math.ceil(self.epochs * per_epoch)
        return steps, steps / per_epoch

    def eval_steps(self, *, at_any_cost: bool) -> int | None:
        """Return the steps between about ``EVALUATIONS`` evaluations, None if even one would take too much time."""
        steps, epochs = self.steps()
        affordable = EVALUATED_SHARE * epochs * self.positions / max(1.0, self.held_out_positions)
        if at_any_cost or affordable >= EVALUATIONS:
            return max(1, round(steps / EVALUATIONS))
        return math.ceil(steps / affordable) if affordable >= 1 else None


@dataclass(frozen=True)
class StepSize:
    """What determines the memory of an optimizer step on one device."""

    student: ModelShape
    longest: int  # tokens of the longest example
    on_cpu: bool
    batch_size: int
    accumulation: int
    checkpointing: bool
    mixed: bool
    from_cache: bool
    trained: int | None = None  # parameters that learn, if not all do

    def memory(self) -> float:
        """Return the estimated peak memory of a step, in bytes."""
        parts = student_memory(
            self.student,
            self.batch_size * self.longest,
            checkpointing=self.checkpointing,
            mixed=self.mixed,
            on_cpu=self.on_cpu,
            trained=self.trained,
        )
        return sum(parts.values())

    def savings(self) -> list[str]:
        """Return the changes that lower the memory of a step, each with its estimated saving in GB, largest first."""
        now = self.memory()
        stage = " in stage 1" if self.from_cache else ""
        fixed = student_memory(self.student, 0, checkpointing=False, mixed=self.mixed, trained=self.trained)
        smaller = f"a student with half of this one's {self.student.parameters:,} parameters"
        options = [(sum(fixed.values()) / 2, smaller)]
        if self.batch_size > 1:
            halved = (
                f"halve --batch-size from {self.batch_size} and double --gradient-accumulation-steps from "
                f"{self.accumulation}"
            )
            options.append((now - replace(self, batch_size=self.batch_size // 2).memory(), halved))
        if self.longest > 2:
            half = f"--max-seq-length {self.longest // 2}{stage}, half the longest example's {self.longest} tokens"
            options.append((now - replace(self, longest=self.longest // 2).memory(), half))
        if not self.checkpointing:
            options.append((now - replace(self, checkpointing=True).memory(), "--use-gradient-checkpointing"))
        if not self.mixed and not self.on_cpu:
            options.append((now - replace(self, mixed=True).memory(), "--use-mixed-precision"))
        useful = sorted((option for option in options if option[0] > 0), reverse=True)
        return [f"{words} (-{saved / GB:.2f} GB)" for saved, words in useful]


def checkpointing_reason(step: StepSize, taken: float, free: float | None) -> str | None:
    """Return why a step has to recompute activations, None if it fits without, or nobody knows what is free.

    ``taken``: bytes of the step that are taken already.
    """
    need = step.memory() - taken
    if free is None or need <= free:
        return None
    less = replace(step, checkpointing=True).memory() - taken
    return (
        f"gradient checkpointing: on: a step takes about {need / GB:.1f} GB more, with it {less / GB:.1f} GB, and "
        f"{free / GB:.1f} GB are free"
    )


def summary(run: RunSize, step: StepSize, device: str, precision: str) -> list[str]:
    """Return the lines printed before a run starts: steps, data, batch and memory."""
    steps, epochs = run.steps()
    data = run.data
    examples = step.batch_size * step.accumulation * run.ranks
    trained = min(examples, run.examples)
    return [
        f"steps: {steps:,}, {epochs:,.2f} epochs",
        f"data: {data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} target positions; "
        f"held out: {run.held_out:,} examples, about {run.held_out_positions:,.0f} target positions",
        f"a step: {examples:,} examples (batch {step.batch_size} x accumulation {step.accumulation} x ranks "
        f"{run.ranks}), about {trained * run.positions / max(1, run.examples):,.0f} target positions",
        f"device: {device}, {precision}; about {step.memory() / GB:.1f} GB (estimate)",
    ]


def shares(mixture: Mixture | None) -> list[str]:
    """Return the lines on the parts of a mixture: each one's share, and how often an epoch reads it."""
    if mixture is None:
        return []
    parts = zip(mixture.names, mixture.weights, mixture.positions, strict=True)
    return [
        f"mixed: {weight:.1%} of the target positions from {name}, an epoch reads "
        f"{mixture.end * weight / own.sum():.2f} times what it holds"
        for name, weight, own in parts
    ]


@contextlib.contextmanager
def explain_memory(step: StepSize, output: Path, num_workers: int) -> Iterator[None]:
    """Turn out-of-memory errors into a LogitcaskError that lists the settings to change, largest saving first."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if WORKER_ENDED in str(error):
            what = f"a process that reads batches was killed, usually because memory ran out ({first_line(error)})"
            first = f"fewer --num-workers than {num_workers} (each holds a shard); "
        elif out_of_memory(error):
            what, first = f"memory ran out ({first_line(error)})", ""
        else:
            raise
        checkpoint = latest_checkpoint(output)
        then = f"then resume with --resume-from-checkpoint {checkpoint}" if checkpoint else "then run the command again"
        raise LogitcaskError(
            f"{what}: a step needs an estimated {step.memory() / GB:.2f} GB; to lower it, largest saving first: "
            f"{first}{'; '.join(step.savings())}; {then}"
        ) from error
