"""transformers.Trainer with the distillation loss, normalised over all target positions of an optimizer step."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import Batch, Collator, TrainingExample
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.models.fused_loss import TeacherRows, fused_loss
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import probe_logits
from logitcask.pipeline.models.losses import LossSettings, LossSums, RouterLoss
from logitcask.pipeline.text.tokenizer import make_loadable
from logitcask.pipeline.train.callbacks.interrupt import ignore_interrupts
from logitcask.pipeline.train.callbacks.nonfinite import StopOnNonFinite
from logitcask.pipeline.train.checkpoints import explain_save_errors, load_weights

SUMS = ("total", "hard", "soft", "teacher_mass", "student_mass")


def make_loss_forward(
    model: PreTrainedModel,
    settings: LossSettings,
    teacher: Callable[[Batch], TeacherRows] | None = None,
    router: RouterLoss | None = None,
) -> None:
    """Replace the model's forward by one that takes a batch and returns LossSums, an ordinary call to any wrapper.

    Without ``target_index`` the original forward runs. The head computes the loss in its own forward, too, because
    only there has FSDP gathered its weight. A ``teacher`` in memory replaces the batch's labels. While training, a
    ``router`` loss is added to the total, once per target position: so a step's mean weighs its batches as usual.
    """
    model_forward, head = model.forward, model.get_output_embeddings()
    properties, head_forward = read_head(model), head.forward

    def head_loss(hidden: Tensor, batch: Batch | None = None, target: TeacherRows | None = None) -> Any:
        if batch is None:
            return head_forward(hidden)
        current = LMHead(head.weight, getattr(head, "bias", None), properties.scale, properties.softcap)
        return fused_loss(hidden, current, batch["gold"], target or batch.get("soft_labels"), settings)

    def loss_forward(*args: Any, target_index: Tensor | None = None, **inputs: Any) -> Any:
        if target_index is None:
            return model_forward(*args, **inputs)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        aux = None
        if router is None or not model.training:
            hidden = last_hidden_states(model, ids, positions)
        else:
            given = {} if positions is None else {"position_ids": positions}
            outputs = model.base_model(input_ids=ids, use_cache=False, output_router_logits=True, **given)
            hidden = outputs.last_hidden_state
            aux = router(outputs.router_logits, inputs["is_token"])
        rows = hidden.flatten(0, 1)[target_index]
        sums = head(rows, inputs, teacher({**inputs, "target_index": target_index}) if teacher else None)
        if router is None or aux is None:
            return sums
        aux = aux * len(target_index)
        return sums._replace(total=sums.total + router.coefficient * aux, aux=aux.detach())

    model.forward, head.forward = loss_forward, head_loss


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


class DistillationTrainer(Trainer):
    """A Trainer whose batches come from a cache and whose loss is a mean over the step's target positions."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        examples: Dataset[TrainingExample],
        sampler: BatchSampler,
        held_out: Sequence[int],
        collator: Collator,
        tokenizer: PreTrainedTokenizerBase,
        nonfinite: StopOnNonFinite,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=Subset(examples, held_out),
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[nonfinite, *callbacks],
        )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # otherwise accelerate rounds labels and losses to the half precision of the weights
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32
            )
        self._nonfinite, self._tokenizer = nonfinite, tokenizer
        self._sampler, self._held_out = sampler, list(held_out)
        self.loss_is_scaled_for_ga = True
        self.finished = False  # whether the checkpoint to resume from is that of the last step
        self._sums: Tensor | None = None  # SUMS and the number of positions since the last log line
        self._slots: Tensor | None = None  # tokens and places for them since the last log line

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

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of batches in the sampler's order."""
        return self._loader(self._sampler)

    def _loader(self, batches: Any) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # zarr does not survive a fork
            worker_init_fn=ignore_interrupts,
            persistent_workers=workers > 0,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # the sampler already splits batches among ranks; accelerate's split would repeat examples to fill the last step
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Return the batches of one optimizer step and the number of their target positions over all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        count = torch.tensor(sum(len(batch["gold"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count[None]).sum()

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this batch's share of the step's mean; ranks are averaged later, hence the factor."""
        sums: LossSums = model(**inputs)
        assert num_items_in_batch is not None
        assert not return_outputs
        parts = [getattr(sums, name).detach() for name in SUMS] + ([] if sums.aux is None else [sums.aux])
        row = torch.stack([*parts, sums.hard.new_tensor(len(inputs["gold"]))])
        self._sums = row if self._sums is None else self._sums + row
        self._slots = inputs["slots"] if self._slots is None else self._slots + inputs["slots"]
        return sums.total * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Run the Trainer's step and note its loss for the check of finiteness."""
        loss: Tensor = super().training_step(*arguments, **named)
        self._nonfinite.note_loss(loss)
        return loss

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Tensor:
        """Note the gradient norm for the check of finiteness: no public method exposes it at every step."""
        norm: Tensor = super()._get_grad_norm(*arguments, **named)
        self._nonfinite.note_norm(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's line with the parts of the loss instead of the Trainer's mean of means."""
        if "loss" in logs and self._sums is not None:
            logs = {key: value for key, value in logs.items() if key != "loss"}
            assert self._slots is not None
            tokens, places = self.accelerator.reduce(self._slots, "sum").tolist()
            logs = {**self._means(self._sums, ""), "padding": 1.0 - tokens / places, "tokens": tokens, **logs}
            self._sums = self._slots = None
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return means over all target positions of the held-out examples, of the same quantities as in training."""
        size = self.args.per_device_eval_batch_size
        ranks = self.args.world_size
        batches = [self._held_out[first : first + size] for first in range(0, len(self._held_out), size)]
        batches += [[]] * (-len(batches) % ranks)  # under FSDP all ranks must call each forward
        self.model.eval()
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches[self.args.process_index :: ranks]:
                sums += self._held_out_sums(batch)
            metrics = self._means(sums.float().to(self.args.device), "eval_")
            if not math.isfinite(metrics["eval_total_loss"]):  # on all ranks, so that all run these forwards
                nonfinite = (i for i in self._held_out if not bool(self._held_out_sums([i]).isfinite().all()))
                self._nonfinite.note_held_out(next(nonfinite, None))
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_sums(self, batch: list[int]) -> Tensor:
        inputs = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in batch]))
        sums: LossSums = self.model(**inputs)
        return torch.stack([*(getattr(sums, n).cpu().double() for n in SUMS), torch.tensor(len(inputs["gold"]))])

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

    def _means(self, sums: Tensor, prefix: str) -> dict[str, float]:
        totals = self.accelerator.reduce(sums, "sum").tolist()
        means = {name: value / max(1.0, totals[-1]) for name, value in zip(SUMS, totals, strict=False)}
        metrics = {f"{prefix}{name}_loss": means[name] for name in ("total", "hard", "soft")}
        metrics[f"{prefix}perplexity"] = float(torch.tensor(means["hard"]).exp())
        metrics[f"{prefix}teacher_captured_mass"] = means["teacher_mass"]
        metrics[f"{prefix}student_head_mass"] = means["student_mass"]
        if len(totals) > len(SUMS) + 1:
            metrics[f"{prefix}aux_loss"] = totals[-2] / max(1.0, totals[-1])
        return metrics
