"""What a run of stage 2 needs, printed before it starts, and what to change if memory runs out."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.pipeline.batches.collate import places_at_once
from logitcask.pipeline.batches.mixture import Mixture
from logitcask.pipeline.console import amount, counted
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.shapes import GB, Amount, ModelShape, student_memory
from logitcask.pipeline.runs.run_folder import latest_checkpoint
from logitcask.pipeline.settings.train import TrainSettings

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
    teacher_bytes: int = 0  # of the head that reads exact labels
    in_parts: bool = False  # whether a batch is trained on some rows after the other

    def memory(self) -> float:
        """Return the estimated peak memory of a step, in bytes."""
        parts = student_memory(
            self.student,
            places_at_once(self.batch_size, self.longest) if self.in_parts else self.batch_size * self.longest,
            checkpointing=self.checkpointing,
            mixed=self.mixed,
            on_cpu=self.on_cpu,
            trained=self.trained,
        )
        return sum(parts.values()) + self.teacher_bytes

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
        f"gradient checkpointing is on: a step takes about {need / GB:.1f} GB more, with it {less / GB:.1f} GB, and "
        f"{free / GB:.1f} GB are free"
    )


def summary(
    settings: TrainSettings, run: RunSize, step: StepSize, *, where: str, free: float | None, packed: bool, loss: str
) -> Iterator[tuple[str, str]]:
    """Yield the labels and texts of the lines printed before a run starts: student, data and plan.

    ``where``: precision and device; ``free``: bytes that a step may take; ``loss``: what it minimises, and the rate.
    """
    steps, epochs = run.steps()
    student = settings.student_model or f"layers {settings.init_from_teacher_layers} of {settings.teacher_model}"
    if settings.student_config is not None:
        student = f"{settings.student_config} (new)"
    parameters = f"{amount(step.student.parameters)} parameters"
    if step.trained is not None and step.trained < step.student.parameters:
        parameters += (
            f", {amount(step.trained)} of them trained"
            if settings.lora_rank is None
            else (f", {amount(step.trained)} of an adapter trained")
        )
    of = "" if free is None else f" of {free / GB:.3g} GB free"
    where += f" on {run.ranks} ranks" if run.ranks > 1 else ""
    yield "student", f"{student}, {parameters}, {where}, about {step.memory() / GB:.2g} GB{of}"
    rows = "packed" if packed else "one example per row"
    yield "data", f"{run.examples:,} examples to train on, {run.held_out:,} held out, {rows}"
    examples = step.batch_size * step.accumulation * run.ranks
    factors = [
        f"{step.batch_size} x {step.accumulation} accumulated" if step.accumulation > 1 else f"{step.batch_size}"
    ]
    factors += [f"{run.ranks} ranks"] if run.ranks > 1 else []
    parts = f" ({' x '.join(factors)})" if examples > step.batch_size else ""
    yield (
        "plan",
        (
            f"{counted(steps, 'step')}, {epochs:,.3g} {'epoch' if epochs == 1 else 'epochs'}, "
            f"{examples:,} examples per step{parts}, {loss}"
        ),
    )


def loss_words(settings: TrainSettings, divergence: str, why_rate: str) -> str:
    """Return what a step minimises and its rate, as in ``hybrid, alpha 0.1, T=1, lr 1e-05``.

    The usual ``divergence``, KL, is not named; nor is why the rate is what it is, if it was given.
    """
    rate = f"lr {settings.learning_rate:g}" + (f" ({why_rate})" if why_rate else "")
    if not settings.soft:
        return f"output, {rate}"
    ramps = (settings.alphas, settings.temperatures)
    alpha, temperature = (" to ".join(f"{end:g}" for end in dict.fromkeys(ramp)) for ramp in ramps)
    others = [*([divergence] if divergence != "KL" else []), *([f"on {settings.select}"] if settings.select else [])]
    return ", ".join([settings.distillation_type, f"alpha {alpha}", f"T={temperature}", *others, rate])


def shares(mixture: Mixture | None) -> list[tuple[str, str]]:
    """Return labels and texts of lines on the parts of a mixture: each one's share, and how often an epoch reads it."""
    if mixture is None:
        return []
    parts = zip(mixture.names, mixture.weights, mixture.positions, strict=True)
    return [
        (
            "mixed",
            f"{weight:.1%} of the target positions from {name}, an epoch reads "
            f"{mixture.end * weight / own.sum():.2f} times what it holds",
        )
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
            f"{what}: a step needs an estimated {step.memory() / GB:.2f} GB; lower it, largest saving first: "
            f"{first}{'; '.join(step.savings())}; {then}"
        ) from error
