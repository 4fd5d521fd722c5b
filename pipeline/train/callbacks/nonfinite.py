"""What stops a run of stage 2 whose numbers are no longer finite, before they are saved."""

import math
from collections.abc import Callable, Sequence
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
SKIPPED_IN_A_ROW = 20  # fp16's loss scale begins at 2^16 and halves with each step it skips: by then it is below 1


class StopOnNonFinite(TrainerCallback):
    """Stops a run whose loss or gradient is no longer finite, before anything of that step is saved.

    The numbers of steps stay on their device until they are looked at: on a CPU at each step, elsewhere when the
    Trainer waits for the device anyway, to log, evaluate, save or end.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        step_examples: Callable[[int], list[int]],
        held_out: Sequence[int],
        label_is_finite: Callable[[int], bool],
        learning_rate: float,
        warmup_steps: int,
        fp16: bool,
        resumed_from: str | None = None,
    ) -> None:
        """``step_examples`` gives the examples of an optimizer step, ``held_out`` are those never trained on."""
        self._output, self._resumed_from = output_dir, resumed_from
        self._step_examples, self._held_out, self._label_is_finite = step_examples, held_out, label_is_finite
        self._learning_rate, self._warmup_steps, self._fp16 = learning_rate, warmup_steps, fp16
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None
        self._rows: list[Tensor] = []  # loss and gradient norm, (2,), of each step not looked at yet
        self._skipped = 0
        self._bad: int | None = None  # the first held-out example whose loss is not finite

    def note_loss(self, loss: Tensor) -> None:
        """Add the loss of a forward pass, a scalar, to its optimizer step's."""
        self._loss = loss if self._loss is None else self._loss + loss

    def note_norm(self, norm: Tensor) -> None:
        """Take the norm of the step's gradient, a scalar; under FSDP in parts, one a rank."""
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def note_held_out(self, bad: int | None) -> None:
        """Take the first held-out example whose loss alone is not finite, None where all are: their sum is not."""
        self._bad = bad

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Raise LogitcaskError where a checkpoint's parameters are not finite."""
        require_finite(model, self._resumed_from or "the student")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        """Raise LogitcaskError where a step since the last look was not finite."""
        assert self._loss is not None
        assert self._norm is not None
        skipped = bool(optimizer.step_was_skipped)  # by fp16's loss scaling, which then tries a smaller scale
        self._skipped = self._skipped + 1 if skipped else 0
        norm = torch.zeros_like(self._norm) if skipped and self._skipped < SKIPPED_IN_A_ROW else self._norm
        self._rows.append(torch.stack([self._loss, norm.to(self._loss)]))
        self._loss = self._norm = None
        waits = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if waits or args.device.type == "cpu":
            self._look(args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Raise LogitcaskError where the loss of the held-out examples is not finite."""
        loss = metrics["eval_total_loss"]
        if not math.isfinite(loss):
            first = (
                "that of none alone" if self._bad is None else f"the first is example {self._bad} of the cache or data"
            )
            advice = self._advice(list(self._held_out) if self._bad is None else [self._bad])
            raise LogitcaskError(
                f"step {state.global_step}: the loss of the held-out examples is {loss}, {first}; {advice}"
            )

    def _look(self, args: TrainingArguments, state: TrainerState) -> None:
        count = len(self._rows)
        rows = gather(torch.stack(self._rows)[None]).cpu()  # (ranks, steps, 2)
        self._rows = []
        if bool(rows.isfinite().all()):
            return
        bad = ~rows.isfinite()
        place = int(bad.any(2).any(0).nonzero()[0])
        step = state.global_step - count + 1 + place
        rank = int(bad[:, place].sum(1).argmax())  # the norm is of all ranks, the loss its own
        loss, norm = rows[rank, place].tolist()
        examples = self._step_examples(step - 1)
        shown = ", ".join(map(str, examples[:IDS_SHOWN])) + (", ..." if len(examples) > IDS_SHOWN else "")
        raise LogitcaskError(
            f"step {step}: non-finite: loss {loss:g}, gradient norm {norm:g}; the step's {len(examples)} "
            f"examples of the cache or data are {shown}; {self._advice(examples)}"
        )

    def _advice(self, examples: list[int]) -> str:
        """The likely cause, and what to do."""
        checkpoint = latest_checkpoint(self._output)
        again = f"resume with --resume-from-checkpoint {checkpoint}" if checkpoint else "start over, no checkpoint yet"
        damaged = next((index for index in examples if not self._label_is_finite(index)), None)
        if damaged is not None:
            return (
                f"likely cause: the label of example {damaged} is not finite: check the data with logitcask cache "
                f"verify, then {again}"
            )
        if self._fp16:
            return (
                "likely cause: numbers above 65,504, the most that fp16 holds: use --mixed-precision-dtype bf16 and "
                f"{again}"
            )
        start = f"--student-model {checkpoint} in another --output-dir" if checkpoint else "the same student"
        return (
            f"likely cause: --learning-rate {self._learning_rate:g} is too high: start from {start} with "
            f"--learning-rate {self._learning_rate / 10:g}, or with more --warmup-steps than {self._warmup_steps}"
        )
