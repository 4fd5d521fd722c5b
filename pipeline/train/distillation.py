"""What the loss of distillation is, as a caller chooses it: ``Distillation``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models.dense.rows import EXACT, ExactLabels
from logitcask.pipeline.models.losses import DIVERGENCES, LossSettings, OwnLoss
from logitcask.pipeline.settings.training.schedule import Ramp

OF_COLLATOR = ("input_ids", "target_index", "gold")  # of every batch


@dataclass(frozen=True)
class Distillation:
    """The loss: alpha * cross-entropy + (1 - alpha) * T^2 * divergence, or in its place a ``loss`` of your own.

    ``alpha``: a number, or (first, last) for a straight line over the steps of a trainer, which evaluates by the last.
    ``temperature``: None takes that of the labels; a number is compared with it. ``divergence``: forward-kl, or with
    exact labels or those of tail="bucket" also reverse-kl, jsd and tvd. ``loss``: a function of the student's logits
    (n, V) of n positions, at T=1, and their ``SoftLabels`` (ids, weights, log_probs, log_rest, temperature), of exact
    labels with every token in the head; it returns n losses.

        Distillation(alpha=0.1)
    """

    alpha: float | tuple[float, float] = 0.1
    temperature: float | None = None
    divergence: str = "forward-kl"
    loss: OwnLoss | None = None

    def __post_init__(self) -> None:
        ends = self.alpha if isinstance(self.alpha, tuple) else (self.alpha, self.alpha)
        if len(ends) != 2 or not all(isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0 for alpha in ends):
            raise LogitcaskError(
                f"alpha must be a number between 0 and 1, or (first, last) of two such, got {self.alpha!r}"
            )
        if self.divergence not in DIVERGENCES:
            raise LogitcaskError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if self.loss is not None and self.divergence != "forward-kl":
            raise LogitcaskError(f"divergence {self.divergence!r} and a loss of your own: give one of the two")

    def settings(self, batch: Mapping[str, Any]) -> LossSettings:
        """Return the loss of a batch at its labels' temperature. Raises LogitcaskError if its labels do not fit."""
        missing = [name for name in OF_COLLATOR if name not in batch]
        if missing:
            raise LogitcaskError(f"the batch has no {missing[0]}: take it from the collator or loader of a cache")
        labels: SoftLabels[Tensor] | ExactLabels[Tensor] | None = batch.get("soft_labels")
        alpha = Ramp.of(self.alpha).last
        if labels is None:
            if alpha < 1.0 and len(batch["target_index"]):  # a rank may have no examples in the last step
                raise LogitcaskError(
                    f"alpha {alpha:g} needs soft labels, but the batch has none: take batches from a cache, or "
                    "set alpha to 1"
                )
            return LossSettings(1.0, 1.0, "sampled", "forward-kl")
        if len(labels.ids) != len(batch["target_index"]):
            raise LogitcaskError(
                f"the batch has labels for {len(labels.ids)} positions and {len(batch['target_index'])} target "
                "positions: take both from one collator"
            )
        if self.temperature is not None and abs(self.temperature - labels.temperature) > 1e-6:
            raise LogitcaskError(
                f"temperature is {self.temperature:g}, but the batch's labels are at {labels.temperature:g}: give "
                f"temperature={self.temperature:g} to the collator or loader, too"
            )
        if self.divergence != "forward-kl" and labels.tail not in ("bucket", EXACT):
            raise LogitcaskError(
                f"divergence {self.divergence} requires labels of tail='bucket', got {labels.tail!r}: give "
                "tail='bucket' to the collator or loader, or take a cache of exact labels"
            )
        return LossSettings(alpha, labels.temperature, labels.tail, self.divergence, self.loss)
