"""Distillation from a cache in any subclass of transformers.Trainer: the loss, its normalisation, the order of data."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import Batch, TrainingExample
from logitcask.pipeline.batches.loader import data_loader
from logitcask.pipeline.models.head import keeps_apart, vocabulary_size
from logitcask.pipeline.models.losses import LossSums, read_router_loss
from logitcask.pipeline.settings.training.schedule import Ramp
from logitcask.pipeline.train.distillation import Distillation
from logitcask.pipeline.train.loss import bare_model, make_loss_forward, require_apart, require_vocabulary
from logitcask.pipeline.train.selection import Selection

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the class that comes after the mixin

SUMS = ("total", "hard", "soft", "teacher_mass", "student_mass")
NO_LOGITS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
OURS = {  # what transformers and TRL do to losses and batches of their own, with the values that ask for nothing
    "label_smoothing_factor": (0.0,),
    "loss_type": ("nll",),
    "completion_only_loss": (None, False),
    "assistant_only_loss": (False,),
    "dataloader_drop_last": (False,),
    "train_sampling_strategy": ("random",),
    "group_by_length": (False, None),
    "auto_find_batch_size": (False,),
}


class DistillationMixin(Trainer):
    """Put before ``transformers.Trainer`` or TRL's ``SFTTrainer``: trains on a cache, normalised over the step.

        class Trainer(lc.DistillationMixin, SFTTrainer): ...
        Trainer(model=model, args=args, train_dataset=cache.dataset(), data_collator=cache.collator(temperature=1.0),
                distillation=lc.Distillation(alpha=0.1)).train()

    The loss is a mean over the target positions of the whole optimizer step, on all ranks. Batches follow the order of
    the cache's shards, shuffled by the seed. ``log`` and ``evaluate`` give the parts of the loss, means over positions.
    """

    loss_is_scaled_for_ga = True  # by the number of the step's positions

    def __init__(
        self, *args: Any, distillation: Distillation | None = None, train_dataset: Any = None, **named: Any
    ) -> None:
        """Take the trainer's own arguments. Raises LogitcaskError if data, model and settings do not fit each other."""
        self.distillation = Distillation() if distillation is None else distillation
        _require_supported(args, named)
        if any(parent.__name__ == "SFTTrainer" for parent in type(self).__mro__):
            self._init_sft(args, named)
        else:
            super().__init__(*args, train_dataset=train_dataset, **named)
        if self.args.n_gpu > 1:
            raise LogitcaskError(
                f"{self.args.n_gpu} GPUs in one process: the Trainer would take DataParallel, whose replicas do not "
                "compute the loss: start with torchrun or accelerate launch, or let CUDA_VISIBLE_DEVICES name one GPU"
            )
        self.train_dataset, self.eval_dataset = train_dataset, named.get("eval_dataset")
        self._prepare_loss()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # otherwise accelerate rounds labels and losses to the half precision of the weights
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32
            )
        self._alphas = Ramp.of(self.distillation.alpha)
        self._now: dict[str, float] = {}  # what changes over the run, at the last step, for the log
        self._selection: Selection | None = None
        self._step: dict[str, Any] = {}  # what the loss needs to know of the step: its alpha, if that changes
        self._sums: Tensor | None = None  # SUMS, labelled positions and all, since the last log line
        self._slots: Tensor | None = None  # tokens and places for them since the last log line

    def _init_sft(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Call SFTTrainer's constructor with a stand-in of the type it insists on, which it has nothing to prepare."""
        from datasets import Dataset

        config = named.get("args", args[1] if len(args) > 1 else None)
        if config is not None:
            if getattr(config, "packing", False) or getattr(config, "padding_free", False):
                raise LogitcaskError(
                    "SFTConfig's packing and padding_free do not apply to a cache: leave them out, and give "
                    "data_collator=cache.collator(packed=True)"
                )
            config.dataset_kwargs = {**(getattr(config, "dataset_kwargs", None) or {}), "skip_prepare_dataset": True}
        stand_in = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})
        held_out = None if named.get("eval_dataset") is None else stand_in
        super().__init__(*args, **{**named, "train_dataset": stand_in, "eval_dataset": held_out})

    def _prepare_loss(self) -> None:
        """Make the model compute the loss. Raises LogitcaskError if data and model do not fit each other."""
        model, data, collator = bare_model(self.model), self.train_dataset, self.data_collator
        if not hasattr(data, "batches"):
            raise LogitcaskError(f"train_dataset must be cache.dataset(), got {type(data).__name__}")
        if not hasattr(collator, "packed"):
            raise LogitcaskError(f"data_collator must be cache.collator(…), got {type(collator).__name__}")
        require_vocabulary(data.vocab_size, vocabulary_size(model))
        if collator.packed:
            require_apart(model, keeps_apart(model))
        make_loss_forward(model, self.distillation, None, read_router_loss(model, None))

    def _batches(self) -> Any:
        args = self.args
        return self.train_dataset.batches(
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            ranks=args.world_size,
            accumulation=args.gradient_accumulation_steps,
            packed=self.data_collator.packed,
        )

    def _items(self) -> Any:
        """Return the data set of what the batch sampler gives."""
        return self.train_dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of batches in the sampler's order."""
        args = self.args
        workers, pinned = args.dataloader_num_workers, args.dataloader_pin_memory
        loader = data_loader(self._items(), self._batches(), self.data_collator, workers, pin_memory=pinned)
        # the sampler already splits batches among ranks; accelerate's split would repeat examples to fill the last step
        prepared: DataLoader[Any] = prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=pinned,
        )
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Return the batches of one optimizer step and the number of their target positions over all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = (sum(len(batch["gold"]) for batch in batches), self._selected(batches))
        row = torch.stack([torch.full((), count, device=device) for count in counts])  # filled there: copies would wait
        positions, selected = self.accelerator.gather(row[None]).sum(0)
        if self._selection is not None:
            self._step["soft_scale"] = float(positions / selected)
        return batches, positions

    def _selected(self, batches: list[Batch]) -> int:
        """Return how many of some batches' target positions take part in the soft loss."""
        if self._selection is None:
            return 0
        return sum(int(self._selection.counts(batch)[1].sum()) for batch in batches)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this batch's share of the step's mean; ranks are averaged later, hence the factor."""
        assert num_items_in_batch is not None
        assert not return_outputs
        if not self._alphas.level:
            self._now["alpha"] = self._step["alpha"] = self._alphas.at(self.state.global_step, self.state.max_steps)
        sums: LossSums = model(**inputs, **self._step)
        parts = [getattr(sums, name).detach() for name in SUMS] + ([] if sums.aux is None else [sums.aux])
        counts = [sums.hard.new_full((), count) for count in (_labelled(inputs), len(inputs["gold"]))]
        row = torch.stack([*parts, *counts])
        self._sums = row if self._sums is None else self._sums + row
        self._slots = inputs["slots"] if self._slots is None else self._slots + inputs["slots"]
        return sums.total * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the trainer's line with the parts of the loss."""
        super().log({**self._parts(), **logs} if "loss" in logs else logs, start_time)

    def _parts(self) -> dict[str, float]:
        """Return means over the target positions since the last line, and the share of padding."""
        if self._sums is None or self._slots is None:
            return {}
        tokens, places = self.accelerator.reduce(self._slots, "sum").tolist()
        parts = {**self._means(self._sums, ""), "padding": 1.0 - tokens / places, "tokens": tokens, **self._now}
        self._sums = self._slots = None
        return parts

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return means over all target positions of a dataset, of the same quantities as in training."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for metrics in parts for name, value in metrics.items()}
        metrics = self._evaluation(dataset, f"{metric_key_prefix}_")
        metrics = {f"{metric_key_prefix}_loss": metrics[f"{metric_key_prefix}_total_loss"], **metrics}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raise LogitcaskError: there are no logits to return."""
        raise LogitcaskError("predict returns logits of the whole vocabulary, which are never made: use evaluate")

    def _evaluation(self, dataset: Any, prefix: str) -> dict[str, float]:
        size, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        batches = [range(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)]
        batches += [range(0)] * (-len(batches) % ranks)  # under FSDP all ranks must call each forward
        self.model.eval()
        sums, teacher = torch.zeros(len(SUMS) + 2, dtype=torch.float64), 0.0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches[self.args.process_index :: ranks]:
                examples = [dataset[i] for i in batch]
                sums += self._sums_of(examples)
                teacher += _teacher_loss(examples)
        metrics = self._means(sums.float().to(self.args.device), prefix)
        parts = torch.tensor([teacher, float(sums[-1])], device=self.args.device)
        total, count = self.accelerator.reduce(parts, "sum").tolist()
        if count and math.isfinite(total):
            metrics[f"{prefix}teacher_hard_loss"] = total / count
            metrics[f"{prefix}teacher_perplexity"] = float(torch.tensor(total / count).exp())
        return metrics

    def _collate_held_out(self, examples: list[Any]) -> Batch:
        return self.data_collator(examples)  # type: ignore[no-any-return]

    def _sums_of(self, examples: list[Any]) -> Tensor:
        batch = self._collate_held_out(examples)
        inputs = {name: part.to(self.args.device) for name, part in batch.items()}
        sums: LossSums = self.model(**inputs)
        counts = torch.tensor([_labelled(inputs), len(inputs["gold"])])
        return torch.stack([*(getattr(sums, n).cpu().double() for n in SUMS), *counts])

    def _means(self, sums: Tensor, prefix: str) -> dict[str, float]:
        totals = self.accelerator.reduce(sums, "sum").tolist()
        labelled, count = (max(1.0, number) for number in totals[-2:])
        of_labels = ("soft", "teacher_mass", "student_mass")
        means = {n: value / (labelled if n in of_labels else count) for n, value in zip(SUMS, totals, strict=False)}
        metrics = {f"{prefix}{name}_loss": means[name] for name in ("total", "hard", "soft")}
        metrics[f"{prefix}perplexity"] = float(torch.tensor(means["hard"]).exp())
        metrics[f"{prefix}teacher_captured_mass"] = means["teacher_mass"]
        metrics[f"{prefix}student_head_mass"] = means["student_mass"]
        if len(totals) > len(SUMS) + 2:
            metrics[f"{prefix}aux_loss"] = totals[-3] / count
        return metrics


def _require_supported(args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raise LogitcaskError if a trainer's arguments ask for what a cache's loss and batches would not do."""
    given = [name for name in NO_LOGITS if named.get(name) is not None]
    if given:
        raise LogitcaskError(f"{given[0]} takes logits of the whole vocabulary, which are never made: leave it out")
    if len(args) > 3:
        raise LogitcaskError("give train_dataset and what follows it by name")
    if named.get("model_init") is not None:
        raise LogitcaskError("model_init makes models that lack the loss: give model, and make a trainer per run")
    config = named.get("args", args[1] if len(args) > 1 else None)
    for name, values in OURS.items() if config is not None else ():
        value = getattr(config, name, values[0])
        if value not in values:
            raise LogitcaskError(
                f"{name}={value!r} does not apply to a cache, which has its own targets, loss and order: leave it out"
            )


def _teacher_loss(examples: Sequence[TrainingExample]) -> float:
    """Return the sum over the examples' targets of the teacher's own hard loss by their labels; nan if one has none."""
    targets = [example.targets for example in examples]
    return sum(math.nan if t is None else -float(t.gold_logprobs.sum(dtype=np.float64)) for t in targets)


def _labelled(batch: Batch) -> int:
    """Return how many of a batch's target positions have a soft loss."""
    return int(batch["labelled"].sum()) if "labelled" in batch else len(batch["gold"])
