"""What a run of stage 2 takes: its figures before it starts, and what to change where memory runs out."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.machine import ran_out
from logitcask.pipeline.models.shapes import ModelShape
from logitcask.pipeline.models.student_memory import GB, Amount, student_memory
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.batches import BatchSampler
from logitcask.pipeline.train.checkpoints import latest_checkpoint

WORKER_ENDED = "DataLoader worker (pid"  # killed from outside, mostly by a system that ran out of memory


@dataclass(frozen=True)
class Extent:
    """How much a run trains on: the data it has, of it held out, and its steps."""

    data: Amount
    held_out: int  # examples
    sampler: BatchSampler
    ranks: int

    def steps(self, settings: TrainSettings) -> tuple[int, float]:
        """Optimizer steps of the run, and the epochs they are; a ``max_steps`` overrides ``epochs``."""
        an_epoch = -(-len(self.sampler) // settings.gradient_accumulation_steps)
        steps = settings.max_steps or math.ceil(settings.epochs * an_epoch)
        return steps, steps / an_epoch


def summary(settings: TrainSettings, extent: Extent, device: str, memory: float) -> list[str]:
    """What the run will do, for its log; ``memory`` is the estimate in bytes."""
    steps, epochs = extent.steps(settings)
    data, kept = extent.data, extent.held_out
    step = settings.batch_size * settings.gradient_accumulation_steps * extent.ranks
    positions = data.positions / data.examples
    precision = f"{settings.mixed_precision_dtype} mixed" if settings.use_mixed_precision else "float32"
    return [
        f"steps: {steps:,}, {epochs:,.2f} epochs",
        f"data: {data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} target positions; "
        f"held out: {kept:,} examples, about {kept * positions:,.0f} target positions",
        f"a step: {step:,} examples (batch {settings.batch_size} x accumulation {settings.gradient_accumulation_steps} "
        f"x ranks {extent.ranks}), about {min(step, data.examples - kept) * positions:,.0f} target positions",
        f"device: {device}, {precision}; about {memory / GB:.1f} GB by estimate",
    ]


@contextlib.contextmanager
def memory_watched(settings: TrainSettings, student: ModelShape, longest: int, device: str) -> Iterator[None]:
    """Tell of memory that runs out within as LogitcaskError, which names the settings that take the most.

    ``longest`` is the tokens of the longest example, ``device`` the kind of device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = ran_out(error)
        if WORKER_ENDED in str(error):
            told = str(error).strip().splitlines()[0].strip()
            what = f"a process that reads batches was ended, as systems do where memory runs out ({told})"
            first = f"fewer --num-workers than {settings.num_workers}, each holds a shard; "
        elif told is not None:
            what, first = f"memory ran out ({told})", ""
        else:
            raise
        advice = first + "; ".join(savings(settings, student, longest, device))
        found = latest_checkpoint(settings.output_dir)
        then = f"then go on with --resume-from-checkpoint {found}" if found else "then run the same command again"
        raise LogitcaskError(
            f"{what}: a step takes about {needed(settings, student, longest, device) / GB:.2f} GB by "
            f"estimate; what lowers it, most first: {advice}; {then}"
        ) from error


def needed(settings: TrainSettings, student: ModelShape, longest: int, device: str, **changes: Any) -> float:
    """Bytes that a step takes at most on a kind of device, by estimate, with some settings changed."""
    changed = settings.model_copy(update=changes)
    parts = student_memory(
        student,
        changed.batch_size * longest,
        checkpointing=changed.use_gradient_checkpointing,
        mixed=changed.use_mixed_precision,
        on_cpu=device == "cpu",
    )
    return sum(parts.values())


def savings(settings: TrainSettings, student: ModelShape, longest: int, device: str) -> list[str]:
    """What lowers the memory of a step, with the present value and the GB it saves by estimate, most first."""
    now = needed(settings, student, longest, device)
    batch, accumulation = settings.batch_size, settings.gradient_accumulation_steps
    length = "--max-seq-length" if settings.cache is None else "--max-seq-length in stage 1"
    fixed = student_memory(student, 0, checkpointing=False, mixed=settings.use_mixed_precision)
    found = [(sum(fixed.values()) / 2, f"a student smaller than {student.parameters:,} parameters, half")]
    if batch > 1:
        words = f"halve --batch-size from {batch} and double --gradient-accumulation-steps from {accumulation}"
        found.append((now - needed(settings, student, longest, device, batch_size=batch // 2), words))
    if longest > 2:
        words = f"a smaller {length}, the longest example has {longest} tokens, half"
        found.append((now - needed(settings, student, longest // 2, device), words))
    if not settings.use_gradient_checkpointing:
        less = now - needed(settings, student, longest, device, use_gradient_checkpointing=True)
        found.append((less, "--use-gradient-checkpointing"))
    if not settings.use_mixed_precision and device != "cpu":
        found.append(
            (now - needed(settings, student, longest, device, use_mixed_precision=True), "--use-mixed-precision")
        )
    helps = sorted((pair for pair in found if pair[0] > 0), reverse=True)
    return [f"{words} (-{less / GB:.2f} GB)" for less, words in helps]
