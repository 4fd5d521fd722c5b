"""Ctrl-C in stage 2: the first ends the run after its step, with a checkpoint; the second ends it at once."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a scheduler that takes a machine back sends the latter


def ignore_interrupts(_: int) -> None:
    """Begin a DataLoader's worker: a terminal interrupts it too, while the step still needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class SaveOnInterrupt(TrainerCallback):
    """Within its context the first SIGINT or SIGTERM asks the Trainer to save and stop; the next acts as ever.

    A signal that is ignored, as in background jobs, stays so. All ranks stop after the same step, one step later than a
    lone one would, since what they tell each other is looked at only then: nobody waits for a device.
    """

    def __init__(self) -> None:
        self.asked = False
        self._stopped_at: TrainerState | None = None
        self._before: dict[int, Any] = {}
        self._told: Tensor | None = None  # by each rank, at the step before

    def __enter__(self) -> Self:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: found for number, found in handlers.items() if found is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def note(self) -> str:
        """What to show while the step ends."""
        return "finishing this step and saving it; a second interrupt stops at once" if self.asked else ""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint and the end, unless the run ends with this step anyway; callbacks see it at its end."""
        asked = self.asked
        if args.world_size > 1:
            asked = self._told is not None and bool(self._told.any())
            self._told = gather(torch.tensor([int(self.asked)], device=args.device))
        if asked and state.global_step + 1 < state.max_steps:
            control.should_save = control.should_training_stop = True
            self._stopped_at = state

    def raise_if_stopped(self, resumed: str | None) -> None:
        """Raise KeyboardInterrupt where the run was stopped; rank 0 tells how to go on.

        ``resumed`` is the option --resume-from-checkpoint that it was begun with.
        """
        if self._stopped_at is None:
            return
        if self._stopped_at.is_world_process_zero:
            option = "" if resumed == "latest" else " and --resume-from-checkpoint latest"
            step, steps = self._stopped_at.global_step, self._stopped_at.max_steps
            line = f"interrupted: step {step} of {steps} is saved: go on with the same command{option}"
            sys.stderr.write(line + "\n")
        raise KeyboardInterrupt
