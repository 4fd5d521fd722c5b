"""A student, and the gradient of its distillation loss in float64, from its full logits and one line per formula."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from logitcask.pipeline.batches.collate import Batch
from tests.support.tiny import WORDS, make_cache, write_jsonl


def mixed_lengths(folder: Path) -> Path:
    """Make a cache of 24 examples, some of which fit in one row together, and return it."""
    records: list[dict[str, object]] = [
        {"prompt": f"{word}?\n", "response": f"{word}" + " and more" * (1 + 3 * n)} for n in range(3) for word in WORDS
    ]
    return make_cache(folder, train_data=str(write_jsonl(folder / "train.jsonl", records)))


def make_student(vocab_size: int = 300, seed: int = 1) -> Any:
    """Return a random two-layer Llama, in float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=0,
            initializer_range=0.1,
        )
    )


def dense_losses(logits: Tensor, batch: Batch, alpha: float) -> Tensor:
    """Return alpha * cross-entropy + (1 - alpha) * T^2 * sum of w (log p - log q) per target position, in float64."""
    z = logits.double().flatten(0, 1)[batch["target_index"]]
    labels, gold = batch["soft_labels"], batch["gold"]
    t = labels.temperature
    log_q = torch.log_softmax(z / t, dim=1).gather(1, labels.ids)
    soft = t * t * (labels.weights.double() * (labels.log_probs.double() - log_q)).sum(1)
    hard = -torch.log_softmax(z, dim=1).gather(1, gold[:, None])[:, 0]
    losses: Tensor = alpha * hard + (1 - alpha) * soft
    return losses


def dense_gradients(model: Any, batches: Sequence[Batch], alpha: float) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss over all batches' positions, and its gradient by parameter, of a float64 copy of a model."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        module.__dict__.pop("forward", None)  # the mixin's, which is bound to the original
    count = sum(len(batch["gold"]) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        positions = {name: batch[name] for name in ("position_ids",) if name in batch}
        logits = wide(input_ids=batch["input_ids"], use_cache=False, **positions).logits
        total = total + dense_losses(logits, batch, alpha).sum() / count
    torch.autograd.backward(total)
    return float(total.detach()), gradients(wide)


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 2e-5) -> None:
    """Compare gradients of the same parameters by the norm of their difference."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (actual[name].double() - wanted).norm() <= relative * wanted.norm() + 1e-12, name
