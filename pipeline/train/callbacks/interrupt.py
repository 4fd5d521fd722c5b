"""Ctrl-C in stage 2: the first saves a checkpoint after the current step and stops; the second stops at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is gone, as with a lost SSH connection; not on Windows
# schedulers send SIGTERM before they reclaim a machine
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP]))


class SaveOnInterrupt(TrainerCallback):
    """Within its context the first SIGINT, SIGTERM or SIGHUP makes the Trainer save and stop.

    The next has its usual effect, except SIGHUP, of which a session that ends sends several. A signal that is ignored,
    as in background jobs or by ``nohup``, stays ignored. All ranks stop after the same step, one step later
    than a single rank would: requests gathered in one step are read in the next, so that no rank waits for its device.
    """

    def __init__(self) -> None:
        self.requested = False
        self._stopped_at: TrainerState | None = None
        self._handlers: dict[int, Any] = {}  # those to restore
        self._requests: Tensor | None = None  # (ranks,), of the step before
        self._terminals: list[int] = []  # descriptors

    def __enter__(self) -> Self:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
        for number in self._handlers:
            signal.signal(number, self._request_stop)
        self._terminals = [number for number in range(3) if os.isatty(number)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        if number == HANGUP:
            signal.signal(number, signal.SIG_IGN)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for terminal in self._terminals:  # writing to it would fail
                os.dup2(nowhere, terminal)
            os.close(nowhere)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def note(self) -> str:
        """Return what to show while the last step finishes, or an empty string."""
        return "finishing this step and saving it; a second interrupt stops at once" if self.requested else ""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Request a checkpoint and the end of the run, unless it ends with this step anyway."""
        stop = self.requested
        if args.world_size > 1:
            stop = self._requests is not None and bool(self._requests.any())
            self._requests = gather(torch.tensor([int(self.requested)], device=args.device))
        if stop and state.global_step + 1 < state.max_steps:
            control.should_save = control.should_training_stop = True
            self._stopped_at = state

    def raise_if_stopped(self, resumed: str | None) -> None:
        """Raise KeyboardInterrupt if the run was stopped; rank 0 prints how to resume.

        ``resumed`` is the value of --resume-from-checkpoint that the run was started with.
        """
        if self._stopped_at is None:
            return
        if self._stopped_at.is_world_process_zero:
            option = "" if resumed == "latest" else " and --resume-from-checkpoint latest"
            step, steps = self._stopped_at.global_step, self._stopped_at.max_steps
            line = f"interrupted: step {step} of {steps} is saved: resume with the same command{option}"
            sys.stderr.write(line + "\n")
        raise KeyboardInterrupt
