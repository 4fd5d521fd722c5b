"""Labels from the logits of anybody's forward pass."""

from typing import TYPE_CHECKING

import numpy as np

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.cache.labels import SparseTargets
from logitcask.cache.manifest import LabelSettings

if TYPE_CHECKING:
    from torch import Tensor


def label_settings(
    vocab_size: int,
    *,
    head_size: int = 8,
    tail_draws: int = 24,
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0),
    seed: int = 0,
) -> LabelSettings:
    """Return how labels are made: their head, their draws outside it, the temperatures students can train at.

        label = logitcask.label_settings(max(tokenizer.get_vocab().values()) + 1, head_size=8, tail_draws=24)

    ``vocab_size`` is the tokenizer's largest id plus one, without a padded model's rest: ``len(tokenizer)`` is less if
    ids have gaps. Raises LogitcaskError if a number is out of range.
    """
    from pydantic import ValidationError

    try:
        label = LabelSettings(
            vocab_size=vocab_size,
            head_size=head_size,
            tail_draws=tail_draws,
            temperatures=[float(t) for t in temperatures],
            seed=seed,
        )
    except (ValidationError, ValueError, TypeError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{problem['loc'][0]}: {problem['msg']}, got {shown(problem['input'])}" if problem else str(error)
        raise LogitcaskError(f"label_settings: {what}") from error
    if head_size + tail_draws > vocab_size or head_size + tail_draws == 0:
        raise LogitcaskError(
            f"label_settings: head_size + tail_draws must be 1 to the vocabulary's {vocab_size}, "
            f"got {head_size + tail_draws}"
        )
    if len(set(label.temperatures)) < len(label.temperatures):
        raise LogitcaskError(f"label_settings: temperatures must differ, got {label.temperatures}")
    return label


def sparsify(logits: "Tensor", gold: "Tensor", label: LabelSettings, *, example: int) -> SparseTargets:
    """Return the sparse labels of one example's N target positions, from a teacher's logits there. Needs torch.

        targets = logitcask.sparsify(logits[mask], input_ids[1:][mask[:-1]], label, example=len(writer))

    ``logits`` has shape (N, vocab_size), ``gold`` (N,) holds the tokens that came next. ``example`` is the example's
    number, which with the label's seed decides its draws: the same arguments give the same label anywhere. Raises
    LogitcaskError if shapes or ids do not fit.
    """
    import torch

    from logitcask.pipeline.teachers import sparsify as torch_sparsify

    logits, gold = torch.as_tensor(logits), torch.as_tensor(gold)
    if logits.ndim != 2 or logits.shape[1] != label.vocab_size:
        raise LogitcaskError(
            f"sparsify: logits must have the shape (N, {label.vocab_size}), got {tuple(logits.shape)}: cut a padded "
            "vocabulary to the tokenizer's"
        )
    if gold.shape != logits.shape[:1] or gold.is_floating_point():
        raise LogitcaskError(f"sparsify: gold must be {len(logits)} token ids, got shape {tuple(gold.shape)}")
    if gold.numel() and not 0 <= int(gold.min()) <= int(gold.max()) < label.vocab_size:
        raise LogitcaskError(f"sparsify: gold must be ids from 0 to {label.vocab_size - 1}, got {int(gold.max())}")
    uniforms = torch_sparsify.uniform_draws(label.seed, int(example), len(logits), label.tail_draws)
    on_device = torch.from_numpy(uniforms.astype(np.float32 if logits.device.type == "mps" else np.float64))
    with torch.no_grad():
        return torch_sparsify.sparsify(
            logits, gold.to(logits.device), on_device.to(logits.device), label.head_size, label.temperatures
        )
