"""Options about the loss of ``logitcask train``."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import Settings
from logitcask.pipeline.settings.training.schedule import Alpha, Fraction, Ramp, Temperatures

ALPHAS = {"output": 1.0, "logit": 0.0, "hybrid": 0.1}  # unless --alpha is given


class LossOptions(Settings):
    """What is minimised."""

    group = "Loss"

    distillation_type: Literal["output", "logit", "hybrid"] = Field(
        "hybrid", description="output: next tokens only; logit: soft labels only; hybrid: both"
    )
    alpha: Alpha | None = Field(
        None, description="weight of the hard loss, or FIRST:LAST over the run's steps; default with hybrid: 0.1"
    )
    temperature: Temperatures = Field(
        1.0,
        description="one of the cache's temperatures, or FIRST:LAST of them over the run's steps; exact labels: any",
    )
    min_fidelity: Fraction | None = Field(
        None, description="refuse a cache whose gradient at --temperature has a smaller cosine to the exact one"
    )
    tail: Literal["sampled", "bucket", "renormalize"] | None = Field(
        None,
        description="how to treat mass outside the head; default: sampled if the cache holds draws, else bucket; with "
        "exact labels their whole distribution",
    )
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "tvd"] = Field(
        "forward-kl", description="others than forward-kl need exact labels, a teacher in memory, or --tail bucket"
    )
    loss: str | None = Field(
        None, description="module:function, a soft loss of your own in place of T^2 times the divergence"
    )
    select: str | None = Field(
        None,
        description="entropy:SHARE or teacher-entropy:SHARE, the soft loss only on this share of each example's "
        "positions, where the student's or teacher's entropy is highest",
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="weight of a mixture of experts' router loss; default: as its config says; 0: off"
    )

    @model_validator(mode="after")
    def _loss_is_defined(self) -> Self:
        fixed = {"output": 1.0, "logit": 0.0}.get(self.distillation_type)
        if fixed is not None and self.alpha not in (None, fixed):
            raise ValueError(
                f"--alpha must be {fixed} for --distillation-type {self.distillation_type}, got {self.alpha}: "
                "use hybrid or leave --alpha out"
            )
        if self.min_fidelity is not None and (
            self.distillation_type == "output" or self.tail is not None or self.divergence != "forward-kl"
        ):
            raise ValueError(
                "--min-fidelity applies to the forward KL with the default tail: "
                "leave out --distillation-type output, --tail and --divergence"
            )
        if self.min_fidelity is not None and not self.temperatures.level:
            raise ValueError("--min-fidelity applies to one --temperature: leave it out with FIRST:LAST")
        if self.divergence != "forward-kl" and self.tail not in (None, "bucket"):
            raise ValueError(f"--divergence {self.divergence} requires --tail bucket, got {self.tail}")
        if self.loss is not None and (not self.soft or self.divergence != "forward-kl" or self.min_fidelity):
            raise ValueError(
                "--loss takes the place of the divergence: leave out --divergence, --min-fidelity and "
                "--distillation-type output"
            )
        return self

    @model_validator(mode="after")
    def _selection_is_defined(self) -> Self:
        if self.select is not None and not self.soft:
            raise ValueError("--select applies to a soft loss: leave it out, or --distillation-type output")
        if self.select is not None and self.selection is None:
            raise ValueError(
                "--select must be entropy:SHARE or teacher-entropy:SHARE with a share above 0 and at most 1, such as "
                f"entropy:0.2, got {self.select!r}"
            )
        return self

    @property
    def selection(self) -> tuple[str, float] | None:
        """By what positions are selected and which share; None if all are."""
        match = re.fullmatch(r"(entropy|teacher-entropy):([0-9]*\.?[0-9]+)", self.select or "")
        return (match[1], float(match[2])) if match and 0 < float(match[2]) <= 1 else None

    @property
    def alphas(self) -> Ramp:
        """The weight of the hard loss over the run."""
        return Ramp.of(ALPHAS[self.distillation_type] if self.alpha is None else self.alpha)

    @property
    def temperatures(self) -> Ramp:
        """The temperature over the run, before it is rounded to those that are stored."""
        return Ramp.of(self.temperature)

    @property
    def soft(self) -> bool:
        """Whether the loss has a soft part at any step."""
        return min(self.alphas) < 1.0
