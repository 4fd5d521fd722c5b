"""The output head of a causal language model, hidden states to logits, separated so that it can run on chosen rows.

Legend: N rows of hidden states, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError


@dataclass(frozen=True)
class LMHead:
    """logits = cap * tanh(scale * (h W' + b) / cap), or scale * (h W' + b) without a soft-cap."""

    weight: Tensor  # (V, width)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """Return the logits (N, V) of hidden states (N, width), in the dtype of the weights.

        If ``room`` is given, they are written to its first N rows: on a CPU, page faults in fresh memory, one per
        4 kB, would cost a tenth of the product's time.
        """
        out = None if room is None else room[: len(hidden)]
        if self.bias is None:
            raw = torch.mm(hidden, self.weight.t(), out=out)
        else:
            raw = torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.scale != 1.0:
            raw = raw.mul_(self.scale)
        if self.softcap is None:
            return raw
        capped = raw.div_(self.softcap).tanh_()
        return capped * self.softcap if capped.requires_grad else capped.mul_(self.softcap)  # autograd saves the tanh


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return the hidden states that a causal LM's head reads, shape (batch, length, width).

    ``position_ids`` has the shape of ``input_ids`` and restarts at 0 with each example packed in a row; see
    ``keeps_apart``.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    hidden: Tensor = model.base_model(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
    return hidden


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Return whether examples packed in one row, separated by position_ids, get the hidden states they get alone.

    Found by trying: it depends on the architecture, its attention kernel and the version of transformers.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    alone = [torch.arange(length, device=device)[None] * 7 % vocabulary for length in (5, 9)]
    positions = torch.cat([torch.arange(ids.shape[1], device=device) for ids in alone])[None]
    try:
        expected = torch.cat([last_hidden_states(model, ids)[0] for ids in alone])
        packed = last_hidden_states(model, torch.cat(alone, dim=1), positions)[0]
    except (TypeError, ValueError):  # the model takes no position_ids
        return False
    finally:
        model.train(was_training)
    return torch.allclose(packed, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@torch.no_grad()
def read_head(model: PreTrainedModel) -> LMHead:
    """Return a model's head, with scale and soft-cap inferred from and checked against the model's own logits.

    Raises LogitcaskError if the architecture does anything else between hidden states and logits.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None:
        raise LogitcaskError(f"{name}: has no language-model head: choose a causal language model")
    was_training = model.training
    model.eval()
    probe = torch.arange(1, 9, device=head.weight.device)[None] % head.weight.shape[0]
    own = model(input_ids=probe).logits[0].double()
    raw = torch.nn.functional.linear(
        last_hidden_states(model, probe)[0], head.weight, getattr(head, "bias", None)
    ).double()
    model.train(was_training)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    uncapped = own if cap is None else cap * torch.atanh((own / cap).clamp(-1 + 1e-7, 1 - 1e-7))
    scale = float((raw * uncapped).sum() / (raw * raw).sum().clamp_min(1e-30))
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    scale = 1.0 if abs(scale - 1.0) < tolerance / 10 else scale
    rebuilt = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
    if not torch.allclose(rebuilt, own, rtol=tolerance, atol=tolerance * max(1.0, float(own.abs().max()))):
        raise LogitcaskError(
            f"{name}: not supported: its logits must be scale * (h W' + b), soft-capped or not: "
            "choose another architecture"
        )
    return LMHead(head.weight, getattr(head, "bias", None), scale, cap)
