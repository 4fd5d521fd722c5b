"""LongRoPE (Ding et al., 2024), as Phi-3 and MiniCPM3 have it: rows of more tokens than the model was first trained on
have other rotary embeddings, and transformers takes those of the batch's longest row for all of its rows.

Legend: B rows, L tokens of the longest, H width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def short_length(model: PreTrainedModel) -> int | None:
    """Return up to how many tokens a row has the short rotary embeddings, None if the model has no others."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one, or one by layer type
    lengths = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def short_and_long_apart(
    hidden_states: Callable[[Tensor], Tensor], ids_BL: Tensor, lengths_B: Tensor, short: int
) -> Tensor:
    """Return the hidden states (B, L, H) that each row gets alone; what stands after a short row is 0."""
    long_B = lengths_B > short
    if bool(long_B.all()):
        return hidden_states(ids_BL)
    of_short = hidden_states(ids_BL[~long_B, : int(lengths_B[~long_B].max())])
    hidden_BLH = of_short.new_zeros(*ids_BL.shape, of_short.shape[-1])
    hidden_BLH[~long_B, : of_short.shape[1]] = of_short
    if bool(long_B.any()):
        hidden_BLH[long_B] = hidden_states(ids_BL[long_B])
    return hidden_BLH
