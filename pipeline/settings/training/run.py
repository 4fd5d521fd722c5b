"""Options about the run of ``logitcask train``: its folder, evaluations, checkpoints, machine and trackers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import FilePath, Place, Seed, Settings, Whole

HELD_OUT, HELD_OUT_MOST = 0.05, 500  # share of the examples, and number


class RunSettings(Settings):
    """Where and how a run is made, saved and reported."""

    group = "Run"

    output_dir: FilePath = Field(description="folder of the run: checkpoints and final/")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description=f"share of examples held out; default: {HELD_OUT:g}, at most {HELD_OUT_MOST} examples"
    )
    eval_steps: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="steps between evaluations; default: about ten per run, fewer if they would add more than a fifth "
        "to its time",
    )
    eval_cache: Place | None = Field(
        None, description="a cache of its own to evaluate on, in place of examples held out of --cache"
    )
    load_best: bool = Field(False, description="final/ is the checkpoint with the lowest held-out loss, not the last")
    early_stopping_patience: Whole | None = Field(
        None, description="stop after so many evaluations in a row without a lower held-out loss"
    )
    save_steps: Whole = Field(1000, description="steps between checkpoints")
    save_total_limit: Whole = Field(3, description="most recent checkpoints to keep, beside the best one")
    logging_steps: Whole = Field(10, description="steps between log lines")
    push_to_hub: str | None = Field(
        None, description="repository on the Hugging Face hub, such as ME/NAME, to send final/ to; made if missing"
    )
    resume_from_checkpoint: Place | None = Field(None, description="a checkpoint folder, or latest")
    extend: bool = Field(False, description="resume a run for more --max-steps or --epochs than it was started with")
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="processes that prefetch batches from the cache"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: an accelerator if there is one")
    use_wandb: bool = Field(False, description="report to Weights & Biases")
    wandb_project: str = Field("logitcask", description="project in W&B and trackio")
    wandb_run_name: str | None = Field(None, description="run name in W&B and trackio")
    use_tensorboard: bool = Field(False, description="write TensorBoard events to the run's folder")
    use_trackio: bool = Field(False, description="report to trackio, on this machine")
    seed: Seed = Field(0, description="seed of initial weights, held-out examples and order")

    @model_validator(mode="after")
    def _only_a_run_that_is_resumed_is_extended(self) -> Self:
        if self.extend and self.resume_from_checkpoint is None:
            raise ValueError(
                "--extend applies to a run that is resumed: give --resume-from-checkpoint, such as latest, too"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_what_it_asks_for(self) -> Self:
        if self.eval_cache is not None and "eval_fraction" in self.model_fields_set and self.eval_fraction:
            raise ValueError("--eval-cache and --eval-fraction: give one of them (--eval-fraction 0 with a cache)")
        asked = (
            "--load-best" if self.load_best else "--early-stopping-patience" if self.early_stopping_patience else None
        )
        if asked and not self.evaluates:
            raise ValueError(f"{asked} needs an --eval-cache, or an --eval-fraction above 0")
        return self

    def held_out_fraction(self, examples: int) -> float:
        """Return the share of the run's own ``examples`` that is held out."""
        if self.eval_cache is not None:
            return 0.0
        return min(HELD_OUT, HELD_OUT_MOST / examples) if self.eval_fraction is None else self.eval_fraction

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_cache is not None or self.eval_fraction != 0

    @property
    def watches_best(self) -> bool:
        """Whether the run keeps track of its best evaluation."""
        return self.load_best or self.early_stopping_patience is not None
