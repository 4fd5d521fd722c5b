"""A run that takes more steps than it began with: --extend."""

from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.run_folder import ENDS_FILE
from logitcask.pipeline.train.resume.choose import Checkpoint


def extension(checkpoint: Checkpoint | None, steps: int, record: dict[str, Any]) -> list[TrainerCallback]:
    """Return the callback of a run that now has more ``steps``, none for another run.

    The record keeps after which steps the run was extended. Raises LogitcaskError if it has no more than before.
    """
    if checkpoint is None:
        return []
    earlier = checkpoint.record.get("extended_at") or []
    if earlier:
        record["extended_at"] = earlier
    if not checkpoint.extended:
        return []
    if steps <= checkpoint.steps:
        raise LogitcaskError(
            f"--extend: {checkpoint.folder} is of a run of {checkpoint.steps:,} steps, and this one has {steps:,}: "
            "give more --max-steps, or without them more --epochs"
        )
    record["extended_at"] = [*earlier, checkpoint.step]
    return [NewLength()]


class NewLength(TrainerCallback):
    """Gives the first step the learning rate of the new length, where the optimizer holds that of the old one."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Set the learning rates; the run counts as unfinished from here on."""
        if isinstance(lr_scheduler, LambdaLR):  # the others know no length
            functions = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            rates = [base * function(lr_scheduler.last_epoch) for base, function in functions]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            lr_scheduler._last_lr = rates  # which the log takes
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / ENDS_FILE).unlink(missing_ok=True)
