"""The best checkpoint so far by the loss of the held-out examples, and the end of a run that finds no better one."""

import sys
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.pipeline.console import say
from logitcask.pipeline.runs.run_folder import SETTINGS_FILE

METRIC = "eval_total_loss"


class BestSoFar(EarlyStoppingCallback):
    """Stops a run after ``patience`` evaluations in a row without a better one; None: never.

    What transformers' own callback counts is in every checkpoint, and is read back from it, as is which checkpoint is
    the best. The run is saved where it stops. Each evaluation has a line of training in the log. A run that is
    ``extended`` after it stopped counts from 0.
    """

    def __init__(self, patience: int | None, *, extended: bool = False) -> None:
        super().__init__(patience or sys.maxsize)
        self._extended = extended
        self._trained: TrainerState | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the count and the best checkpoint of a resumed run, whose folder may have been moved."""
        self._trained = state
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(stored, dict):
            count = int(stored["attributes"]["early_stopping_patience_counter"])
            stopped = self._extended and count >= self.early_stopping_patience
            self.early_stopping_patience_counter = 0 if stopped else count
        if not state.best_global_step:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if (best / SETTINGS_FILE).is_file():
            state.best_model_checkpoint = str(best)
            return
        if not args.load_best_model_at_end:  # its loss alone counts, nobody keeps it
            state.best_model_checkpoint = None
            return
        if state.is_world_process_zero:
            say(f"{best}: the best so far, is gone: the best from step {state.global_step} on counts")
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a log line with each evaluation, which may save a checkpoint."""
        if control.should_evaluate:
            control.should_log = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Count; save where the run stops."""
        super().on_evaluate(args, state, control, metrics)
        if control.should_training_stop:
            control.should_save = True

    def note(self) -> str:
        """Return the best so far, to show during the run; an empty string before there is one."""
        best = self.best
        if best is None:
            return ""
        count, most = self.early_stopping_patience_counter, self.early_stopping_patience
        left = f"; {count} of {most} evaluations without a better one" if most < sys.maxsize else ""
        return f"best held-out loss so far: {best[METRIC]:.4g} at step {best['step']:,}{left}"

    @property
    def best(self) -> dict[str, float] | None:
        """The step with the lowest held-out loss and that loss; None before the first evaluation."""
        state = self._trained
        if state is None or state.best_metric is None or state.best_global_step is None:
            return None
        return {"step": state.best_global_step, METRIC: state.best_metric}

    def report(self, loaded: bool) -> None:
        """Say which checkpoint was the best, and that the run stopped early; ``loaded``: whether it became final."""
        state, best = self._trained, self.best
        if state is None or best is None or not state.is_world_process_zero:
            return
        patience = self.early_stopping_patience
        if self.early_stopping_patience_counter >= patience and state.global_step < state.max_steps:
            steps = f"step {state.global_step:,} of {state.max_steps:,}"
            say(f"stopped early: {steps}, after {patience} evaluations without a lower held-out loss")
        final = ", which final/ is" if loaded else ""
        say(f"best held-out loss: {best[METRIC]:.4g} at step {best['step']:,}{final}")


def stopped_early(checkpoint: Path, patience: int | None) -> bool:
    """Return whether a run was saved in a checkpoint because it had stopped early, by the patience it has now."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stored = (state.stateful_callbacks or {}).get(BestSoFar.__name__)
    return (
        patience is not None
        and stored is not None
        and (stored["attributes"]["early_stopping_patience_counter"] >= patience)
    )
