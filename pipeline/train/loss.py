"""The loss of a batch for any loop or trainer: from hidden states and head, or from logits.

Legend: R rows of a batch, L tokens per row, N target positions of the batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.batches.collate import Batch
from logitcask.pipeline.models.dense.rows import DenseRows, ExactLabels, ExactRows, for_divergence, log_probs
from logitcask.pipeline.models.fused_loss import fused_loss, fused_position_losses
from logitcask.pipeline.models.head import (
    LMHead,
    keeps_apart,
    last_hidden_states,
    read_head,
    trained_head,
    vocabulary_size,
)
from logitcask.pipeline.models.losses import LossSettings, OwnLoss, RouterLoss, position_losses
from logitcask.pipeline.train.distillation import Distillation
from logitcask.pipeline.train.selection import Selection, loss_of_replay, selected_loss


def make_loss_forward(
    model: PreTrainedModel,
    how: LossSettings | Distillation,
    teacher: Callable[[Batch], DenseRows] | None = None,
    router: RouterLoss | None = None,
    selection: Selection | None = None,
) -> None:
    """Replace the model's forward by one that takes a batch and returns LossSums, an ordinary call to any wrapper.

    Without ``target_index`` the original forward runs. The head computes the loss in its own forward, too, because
    only there has FSDP gathered its weight. An ``alpha`` in the batch replaces that of ``how``, and a ``teacher`` in
    memory the batch's labels. While training, a ``router`` loss is added to the total, once per target position: so a
    step's mean weighs its batches as usual; and the soft loss is that of the ``selection``.
    """
    read = read_head(model)
    _install(model, read.scale, read.softcap, how, teacher, router, selection)


def _install(
    model: PreTrainedModel,
    scale: float,
    softcap: float | None,
    how: LossSettings | Distillation,
    teacher: Callable[[Batch], DenseRows] | None = None,
    router: RouterLoss | None = None,
    selection: Selection | None = None,
    *,
    per_position: bool = False,
) -> None:
    """Replace the forward of a model and its head by methods, which a deep copy of the model has of its own."""
    model_forward, head_forward = _function(model), _function(model.get_output_embeddings())

    def head_loss(head: nn.Module, hidden: Tensor, batch: Batch | None = None, target: DenseRows | None = None) -> Any:
        if batch is None:
            return head_forward(head, hidden)
        run = trained_head(head)
        current = LMHead(run.weight, getattr(run, "bias", None), scale, softcap)
        settings = _at_step(how if isinstance(how, LossSettings) else how.settings(batch), batch)
        batch = with_rows(batch, hidden.device)
        if per_position:
            return fused_position_losses(hidden, current, batch["gold"], batch.get("soft_labels"), settings)
        if "labelled" in batch:
            return loss_of_replay(hidden, current, batch, settings)
        if selection is not None and head.training and "soft_labels" in batch:
            return selected_loss(hidden, current, batch, settings, selection)
        return fused_loss(hidden, current, batch["gold"], target or batch.get("soft_labels"), settings)

    def loss_forward(model: PreTrainedModel, *args: Any, target_index: Tensor | None = None, **inputs: Any) -> Any:
        if target_index is None:
            return model_forward(model, *args, **inputs)
        batch = {**inputs, "target_index": target_index}
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        aux = None
        if router is None or not model.training:
            hidden = last_hidden_states(model, ids, positions)
        else:
            given = {} if positions is None else {"position_ids": positions}
            outputs = model.base_model(input_ids=ids, use_cache=False, output_router_logits=True, **given)
            hidden = outputs.last_hidden_state
            aux = router(outputs.router_logits, inputs["is_token"])
        head = model.get_output_embeddings()
        sums = head(hidden.flatten(0, 1)[target_index], batch, teacher(batch) if teacher else None)
        if router is None or aux is None:
            return sums
        aux = aux * len(target_index)
        return sums._replace(total=sums.total + router.coefficient * aux, aux=aux.detach())

    # compiled, the loss would be compiled again per number of positions
    eager_head_loss = torch.compiler.disable(head_loss)  # type: ignore[no-untyped-call]
    for module, method in ((model, loss_forward), (model.get_output_embeddings(), eager_head_loss)):
        module.forward = MethodType(method, module)


def _function(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward as a function of the module, too."""
    forward = module.forward
    return getattr(forward, "__func__", None) or (lambda _, *args, **named: forward(*args, **named))


def with_rows(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its exact labels, if it has any, joined to the teacher's head, which its cache holds."""
    labels = batch.get("soft_labels")
    if not isinstance(labels, ExactLabels):
        return batch
    return {**batch, "soft_labels": labels.rows(device)}


def _at_step(how: LossSettings, batch: Batch) -> LossSettings:
    """Return the loss with what changes over a run as it is in this batch: alpha, and its labels' temperature."""
    return replace(how, alpha=batch.get("alpha", how.alpha), temperature=batch.get("soft_labels", how).temperature)


def bare_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal LM inside wrappers: peft's, DistributedDataParallel, torch.compile.

    Raises LogitcaskError if there is none, or its adapter adds tokens to the input.
    """
    bare: Any = model
    while not isinstance(bare, PreTrainedModel):
        if hasattr(bare, "get_base_model"):
            if getattr(bare.active_peft_config, "is_prompt_learning", False):
                raise LogitcaskError(
                    f"{type(bare.active_peft_config).__name__}: not supported: it adds tokens to the input; use LoRA"
                )
            bare = bare.get_base_model()
        elif isinstance(bare, nn.Module) and (inner := getattr(bare, "module", getattr(bare, "_orig_mod", None))):
            bare = inner
        else:
            raise LogitcaskError(
                f"the model must be a causal language model of transformers, got {type(bare).__name__}"
            )
    return bare


@dataclass
class _Student:
    """What is found out once about a model: its head's scale and soft-cap, and whether it keeps examples apart."""

    scale: float
    softcap: float | None
    apart: bool | None = None


_students: WeakKeyDictionary[nn.Module, _Student] = WeakKeyDictionary()


def kd_loss(
    model: nn.Module,
    batch: Batch,
    alpha: float = 0.1,
    temperature: float | None = None,
    divergence: str = "forward-kl",
    *,
    loss: OwnLoss | None = None,
    per_position: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the distillation loss of a batch, its mean over the target positions, without the full logits.

        loss = lc.kd_loss(model, batch, alpha=0.1)
        loss.backward()

    ``model``: a causal LM of transformers, with peft and DistributedDataParallel around it or not; ``batch``: from
    ``loader`` or ``collator``, moved to the model's device. ``alpha``, ``temperature``, ``divergence`` and ``loss``:
    see ``Distillation``. ``normalizer``: what the sum over the positions is divided by, in place of their number: with
    accumulation, that of the whole optimizer step. ``per_position``: return the losses (N,) themselves, in the order of
    ``batch["target_index"]``. A mixture of experts' router loss is not part of it.
    Raises LogitcaskError if model and batch do not fit each other.
    """
    how, bare = Distillation(alpha, temperature, divergence, loss), bare_model(model)
    how.settings(batch)  # says early what does not fit
    device = bare.get_input_embeddings().weight.device
    if hasattr(bare, "_original_forward") and not torch.is_autocast_enabled(device.type):
        raise LogitcaskError(
            "the model was prepared by accelerate for mixed precision: call kd_loss inside accelerator.autocast()"
        )
    student = _students.get(bare)
    if student is None or batch["input_ids"].device.type == "cpu":
        _require_same_positions(batch)
        _require_vocabulary(batch, vocabulary_size(bare), device)
    if student is None:
        read = read_head(bare)
        student = _students[bare] = _Student(read.scale, read.softcap)
    if "position_ids" in batch:
        student.apart = keeps_apart(bare) if student.apart is None else student.apart
        require_apart(bare, student.apart)
    moved = {name: value.to(device) for name, value in batch.items()}
    with _installed(bare, student, how, per_position):
        result = model(**moved)
    if per_position:
        losses: Tensor = result
        return losses
    total: Tensor = result.total
    return total / (max(1, len(batch["target_index"])) if normalizer is None else normalizer)


@contextmanager
def _installed(model: PreTrainedModel, student: _Student, how: Distillation, per_position: bool) -> Iterator[None]:
    """Replace the forward of model and head for one call, so that wrappers see an ordinary one."""
    modules = (model, model.get_output_embeddings())
    before = [module.__dict__.get("forward") for module in modules]
    _install(model, student.scale, student.softcap, how, per_position=per_position)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def kd_loss_from_logits(
    logits: Tensor,
    batch: Batch,
    alpha: float = 0.1,
    temperature: float | None = None,
    divergence: str = "forward-kl",
    *,
    loss: OwnLoss | None = None,
    per_position: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the loss of ``kd_loss`` from logits (R, L, V) of ``batch["input_ids"]``, or (N, V) of the targets alone.

        logits = model(input_ids=batch["input_ids"]).logits
        loss = lc.kd_loss_from_logits(logits, batch, alpha=0.1)

    For models that ``kd_loss`` does not take; the logits and their gradient are in memory. Raises LogitcaskError if
    logits and batch do not fit each other.
    """
    settings = Distillation(alpha, temperature, divergence, loss).settings(batch)
    rows, index = batch["input_ids"].shape, batch["target_index"]
    if logits.shape[:-1] not in (rows, index.shape):
        raise LogitcaskError(
            f"logits must have the shape ({rows[0]}, {rows[1]}, V) of the batch's input_ids, or ({len(index)}, V) of "
            f"its target positions, got {tuple(logits.shape)}"
        )
    if batch["input_ids"].device.type == "cpu":
        _require_same_positions(batch)
        _require_vocabulary(batch, logits.shape[-1], logits.device)
    moved = {name: value.to(logits.device) for name, value in batch.items()}
    selected = logits if logits.dim() == 2 else logits.flatten(0, 1)[moved["target_index"]]
    wide = selected if selected.dtype == torch.float64 else selected.float()
    labels = with_rows(moved, logits.device).get("soft_labels")
    if isinstance(labels, ExactRows):
        labels = log_probs(for_divergence(labels, divergence), slice(None), labels.temperature)
    losses = position_losses(wide, moved["gold"], labels, settings)[0]
    if per_position:
        return losses
    return losses.sum() / (max(1, len(index)) if normalizer is None else normalizer)


def require_apart(model: PreTrainedModel, apart: bool) -> None:
    """Raise LogitcaskError if examples that share a row would see each other."""
    if not apart:
        raise LogitcaskError(
            f"{type(model).__name__}: with packed=True, examples that share a row would see each other in this model: "
            "leave packed out"
        )


def require_vocabulary(needed: int, size: int) -> None:
    """Raise LogitcaskError if a model has too few tokens for labels."""
    if needed > size:
        raise LogitcaskError(
            f"the model's vocabulary has {size:,} tokens and the labels need {needed:,}: use a model of the labels' "
            "tokenizer, or resize_token_embeddings"
        )


def _require_vocabulary(batch: Batch, size: int, device: torch.device) -> None:
    labels: SoftLabels[Tensor] | ExactLabels[Tensor] | None = batch.get("soft_labels")
    if isinstance(labels, ExactLabels):
        require_vocabulary(len(labels.teacher_head(device).head.weight), size)
    ids = [batch["input_ids"]] + ([labels.ids] if isinstance(labels, SoftLabels) else [])
    require_vocabulary(max(int(part.max()) + 1 if part.numel() else 0 for part in ids), size)


def _require_same_positions(batch: Batch) -> None:
    """Raise LogitcaskError if the tokens after the target positions are not those that the labels are for."""
    ids, after = batch["input_ids"].flatten(), batch["target_index"] + 1
    if len(after) and (int(after.max()) >= len(ids) or not torch.equal(ids[after], batch["gold"])):
        raise LogitcaskError(
            "the batch's labels are for other positions: input_ids was padded, cut or shifted after the collator"
        )
