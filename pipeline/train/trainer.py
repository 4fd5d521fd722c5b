"""The Trainer of stage 2: the mixin, on the run's own order of examples, with its checkpoints and checks."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import CPU_PART, Batch, Collator, Examples, in_parts
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.batches.scheduled import ScheduledExamples, ScheduledSampler
from logitcask.pipeline.models.dense.rows import EXACT, DenseRows
from logitcask.pipeline.models.load import probe_logits
from logitcask.pipeline.models.losses import LossSettings, RouterLoss
from logitcask.pipeline.runs.run_folder import explain_save_errors
from logitcask.pipeline.settings.training.schedule import Ramp
from logitcask.pipeline.text.tokenizer import make_loadable
from logitcask.pipeline.train.callbacks.nonfinite import StopOnNonFinite
from logitcask.pipeline.train.loss import make_loss_forward
from logitcask.pipeline.train.mixin import DistillationMixin
from logitcask.pipeline.train.resume.saving import load_weights
from logitcask.pipeline.train.selection import Selection


def fsdp_requested() -> bool:
    """Return whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_fsdp(trainer: Trainer) -> None:
    """Raise LogitcaskError if FSDP was requested but accelerate would skip it or use FSDP version 1."""
    if fsdp_requested() and not trainer.accelerator.is_fsdp2:
        version, device = os.environ.get("FSDP_VERSION", "1"), trainer.accelerator.device.type
        raise LogitcaskError(
            f"accelerate's FSDP must have fsdp_version 2 and run on several accelerators, got version {version} and "
            f"{trainer.args.world_size} ranks on {device}: see configs/accelerate/fsdp.yaml, or use torchrun"
        )


@dataclass(frozen=True)
class HeldOut:
    """The examples that a run is evaluated on: some of its own, or those of another cache."""

    examples: Examples
    places: list[int]  # which of them
    collator: Collator


class DistillationTrainer(DistillationMixin, Trainer):
    """The Trainer of ``logitcask train``: its own order and held-out examples, exact resume, a check of finiteness.

    ``loss`` is that of evaluations; ``alphas`` and ``temperatures`` replace its own at each step.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        examples: Examples,
        sampler: BatchSampler,
        collator: Collator,
        tokenizer: PreTrainedTokenizerBase,
        nonfinite: StopOnNonFinite,
        callbacks: list[TrainerCallback],
        loss: LossSettings,
        alphas: Ramp | None = None,
        temperatures: Ramp | None = None,
        held_out: HeldOut | None = None,
        teacher: Callable[[Batch], DenseRows] | None = None,
        router: RouterLoss | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._sampler, self._held_out = sampler, held_out or HeldOut(examples, [], collator)
        self._loss, self._teacher, self._router, self._chosen = loss, teacher, router, selection
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=Subset(self._held_out.examples, self._held_out.places),
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[nonfinite, *callbacks],
        )
        self._selection = selection
        self._alphas = alphas or Ramp.of(loss.alpha)
        self._temperatures = temperatures or Ramp.of(loss.temperature)
        self._nonfinite, self._tokenizer = nonfinite, tokenizer
        self._has_best = False  # whether the model is the best checkpoint's
        self._evaluated: tuple[int, dict[str, float]] = -1, {}  # the last evaluation, and its step
        self.finished = False  # whether the checkpoint to resume from is that of the last step

    def _prepare_loss(self) -> None:
        make_loss_forward(self.model, self._loss, self._teacher, self._router, self._chosen)

    def _batches(self) -> BatchSampler | ScheduledSampler:
        if self._temperatures.level:
            return self._sampler
        stored, accumulation = self.data_collator.temperatures, self.args.gradient_accumulation_steps
        stored = None if self.data_collator.tail == EXACT else stored
        return ScheduledSampler(
            self._sampler, self._temperatures, stored, accumulation=accumulation, steps=self.args.max_steps
        )

    def _items(self) -> Any:
        return self.train_dataset if self._temperatures.level else ScheduledExamples(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Batch, *given: Any, **named: Any) -> Any:
        """Return the mixin's loss, noting for the log the temperature of the labels if it changes over the run."""
        if not self._temperatures.level and "soft_labels" in inputs:
            self._now["temperature"] = inputs["soft_labels"].temperature
        return super().compute_loss(model, inputs, *given, **named)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with explain_save_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights stored under the names of the architecture's own files; FSDP stores them under the model's."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(Path(resume_from_checkpoint), self.model)

    def set_initial_training_values(self, *given: Any, **named: Any) -> Any:
        """Return the Trainer's counts, of no epochs for a finished run, of which the Trainer would train more."""
        epochs, *rest = super().set_initial_training_values(*given, **named)
        return 0 if self.finished else epochs, *rest

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Run the Trainer's step, on a CPU on some rows after the other, and note its loss for the check of finiteness.

        The gradients of the parts add up to the batch's, and only one part's activations are in memory. A router's loss
        is one of the whole batch.
        """
        whole = self.args.device.type != "cpu" or self._router is not None
        *others, last = [inputs] if whole else in_parts(inputs, CPU_PART)
        losses = []
        for part in others:
            with self.accelerator.no_sync(model):  # ranks average their gradients once
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        loss = torch.stack(losses).sum()
        self._nonfinite.note_loss(loss)
        return loss

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Tensor:
        """Note the gradient norm for the check of finiteness: no public method exposes it at every step."""
        norm: Tensor = super()._get_grad_norm(*arguments, **named)
        self._nonfinite.note_norm(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's line with the parts of the loss instead of the Trainer's mean of means."""
        if "loss" in logs and (parts := self._parts()):
            logs = {**parts, **{key: value for key, value in logs.items() if key != "loss"}}
        Trainer.log(self, logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return means over all target positions of the held-out examples, of the same quantities as in training."""
        metrics = self._evaluation(self.eval_dataset, "eval_")
        if not math.isfinite(metrics["eval_total_loss"]):  # on all ranks, so that all run these forwards
            with torch.no_grad():
                sums = ((i, self._sums_of([self._held_out.examples[i]])) for i in self._held_out.places)
                self._nonfinite.note_held_out(next((i for i, s in sums if not bool(s.isfinite().all())), None))
        if not self._has_best:  # else the log would have it as of the last step
            self.log(metrics)
        self._evaluated = self.state.global_step, metrics
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def evaluated(self) -> dict[str, float]:
        """The evaluation of the weights as they are now, empty if there is none."""
        step, metrics = self._evaluated
        return {} if self._has_best or step != self.state.global_step else metrics

    def _collate_held_out(self, examples: list[Any]) -> Batch:
        return self._held_out.collator(examples)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save a checkpoint at each new best, if the best is to be loaded: it may be between those that are due."""
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights as ``_load_from_checkpoint`` does."""
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_weights(Path(str(self.state.best_model_checkpoint)), self.model)
        self._has_best = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save an ordinary, unsharded model at the end of a run; the format of checkpoints follows FSDP's settings."""
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}  # gathered tensors no longer share memory
        self._save(output_dir, state_dict={name: tensor for name, tensor in state.items() if name not in tied})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a model and its tokenizer such that AutoTokenizer, which looks at the model's type, loads the same."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # other ranks write nothing
            make_loadable(self._tokenizer, Path(output_dir or str(self.args.output_dir)))

    def student_logits(self) -> Tensor:
        """Return the student's logits (L, V) on a probe; all ranks must call it."""
        return probe_logits(self.model, sharded=self.is_fsdp_enabled)
