"""Stops a run of stage 2 whose loss or gradient is non-finite, before anything of that step is saved."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.load import require_finite
from logitcask.pipeline.runs.run_folder import latest_checkpoint

IDS_SHOWN = 256
SKIPPED_IN_A_ROW = 20  # fp16's loss scale starts at 2^16 and halves at each skipped step: by then it is below 1


@dataclass(frozen=True)
class Labels:
    """Whether an example's label is finite, and what messages call examples."""

    is_finite: Callable[[int], bool]
    describe: Callable[[Sequence[int]], str] = lambda examples: ", ".join(map(str, examples))


class StopOnNonFinite(TrainerCallback):
    """Raises LogitcaskError if the loss or gradient of a step is non-finite, before anything of that step is saved.

    On a CPU each step is checked at once. On an accelerator the numbers stay on the device until the Trainer waits for
    it anyway, to log, evaluate, save or end.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        step_examples: Callable[[int], list[int]],
        held_out: Sequence[int],
        labels: Labels,
        learning_rate: float,
        warmup_steps: int,
        fp16: bool,
        resumed_from: str | None = None,
        held_out_labels: Labels | None = None,
    ) -> None:
        """``step_examples`` returns the examples of an optimizer step; those in ``held_out`` are
        never trained on, and may be of another cache.
        """
        self._output, self._resumed_from = output_dir, resumed_from
        self._step_examples, self._held_out = step_examples, held_out
        self._labels, self._held_out_labels = labels, held_out_labels or labels
        self._learning_rate, self._warmup_steps, self._fp16 = learning_rate, warmup_steps, fp16
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None
        self._rows: list[Tensor] = []  # loss and gradient norm, (2,), of each step not checked yet
        self._skipped = 0  # steps in a row that fp16's loss scaling skipped
        self._held_out_culprit: int | None = None  # the first held-out example whose loss is non-finite

    def note_loss(self, loss: Tensor) -> None:
        """Add the loss of a forward pass, a scalar, to that of its optimizer step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def note_norm(self, norm: Tensor) -> None:
        """Store the norm of the step's gradient, a scalar; under FSDP a DTensor with one part per rank."""
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def note_held_out(self, example: int | None) -> None:
        """Store the first held-out example whose own loss is non-finite, None if only the sum over examples is."""
        self._held_out_culprit = example

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Raise LogitcaskError if a parameter of the student or of the checkpoint is non-finite."""
        require_finite(model, self._resumed_from or "the student")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        """Raise LogitcaskError if a step since the last check was non-finite."""
        assert self._loss is not None
        assert self._norm is not None
        skipped = bool(optimizer.step_was_skipped)  # by fp16's loss scaling, which then lowers its scale
        self._skipped = self._skipped + 1 if skipped else 0
        norm = torch.zeros_like(self._norm) if skipped and self._skipped < SKIPPED_IN_A_ROW else self._norm
        self._rows.append(torch.stack([self._loss, norm.to(self._loss)]))
        self._loss = self._norm = None
        waits = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if waits or args.device.type == "cpu":
            self._check(args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Raise LogitcaskError if the loss of the held-out examples is non-finite."""
        loss = metrics["eval_total_loss"]
        if not math.isfinite(loss):
            culprit = self._held_out_culprit
            first = (
                "though each example's own is finite"
                if culprit is None
                else f"first at example {self._held_out_labels.describe([culprit])} of the cache or data"
            )
            examples = list(self._held_out) if culprit is None else [culprit]
            advice = self._advice(examples, self._held_out_labels)
            raise LogitcaskError(
                f"step {state.global_step}: non-finite loss ({loss}) of the held-out examples, {first}; {advice}"
            )

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        count = len(self._rows)
        rows = gather(torch.stack(self._rows)[None]).cpu()  # (ranks, steps, 2)
        self._rows = []
        if bool(rows.isfinite().all()):
            return
        nonfinite = ~rows.isfinite()
        first = int(nonfinite.any(2).any(0).nonzero()[0])
        step = state.global_step - count + 1 + first
        rank = int(nonfinite[:, first].sum(1).argmax())  # ranks share the norm, but each has its own loss
        loss, norm = rows[rank, first].tolist()
        examples = self._step_examples(step - 1)
        shown = self._labels.describe(examples[:IDS_SHOWN]) + (", ..." if len(examples) > IDS_SHOWN else "")
        raise LogitcaskError(
            f"step {step}: non-finite: loss {loss:g}, gradient norm {norm:g}; the step's {len(examples)} "
            f"examples of the cache or data are {shown}; {self._advice(examples, self._labels)}"
        )

    def _advice(self, examples: list[int], labels: Labels) -> str:
        """Return the likely cause and the remedy."""
        checkpoint = latest_checkpoint(self._output)
        again = f"resume with --resume-from-checkpoint {checkpoint}" if checkpoint else "start over (no checkpoint yet)"
        damaged = next((index for index in examples if not labels.is_finite(index)), None)
        if damaged is not None:
            return (
                f"likely cause: the label of example {labels.describe([damaged])} is non-finite: run logitcask cache "
                f"verify, then {again}"
            )
        if self._fp16:
            return (
                f"likely cause: numbers above 65,504, the largest in fp16: use --mixed-precision-dtype bf16 and {again}"
            )
        start = f"--student-model {checkpoint} in another --output-dir" if checkpoint else "the same student"
        return (
            f"likely cause: --learning-rate {self._learning_rate:g} is too high: start from {start} with "
            f"--learning-rate {self._learning_rate / 10:g}, or with more --warmup-steps than {self._warmup_steps}"
        )
