"""The teacher's head as a cache keeps it: read from a model, or measured where an engine hides it.

Legend: V vocabulary, W width of the hidden states.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from logitcask.cache.exact.head import TeacherHead, as_bfloat16
from logitcask.cache.labels import FloatArray
from logitcask.pipeline.models.head import LMHead

ROWS = 4096  # of a head in float32 at a time
PROBES = 256  # unit vectors given to a head at a time
LARGE = 2.0**6, 2.0**12  # factors of probes, of which the second saturates any soft-cap and the first nearly does
SCALARS = "scale", "softcap"


def stored_head(head: LMHead, vocab_size: int) -> TeacherHead:
    """Return a model's head as a cache keeps it, without a basis; rows beyond the vocabulary are dropped."""
    weight = _bits(head.weight.detach()[:vocab_size])
    bias = None if head.bias is None else head.bias[:vocab_size].detach().float().cpu().numpy()
    return _without_basis(weight, bias, head.scale, head.softcap)


def measured_head(
    logits_of: Callable[[Tensor], Tensor | None], width: int, vocab_size: int, like: Tensor
) -> TeacherHead | None:
    """Return a head from the logits that it gives for unit vectors of the dtype and device of ``like``.

    None on ranks that have no logits. A scale is part of the weights; a soft-cap is what large logits come near to.
    """
    nothing_1V = logits_of(like.new_zeros(1, width))
    bias_V = None if nothing_1V is None else nothing_1V[0, :vocab_size].float().cpu()
    cap = _measured_cap(logits_of, width, like)
    biased = bias_V is not None and bool(bias_V.any())
    large = biased and cap is None  # else a bias would round the weights away
    unit = LARGE[0] if large else 1.0
    table_VW = torch.empty(vocab_size, width, dtype=like.dtype) if bias_V is not None else None
    for first in range(0, width, PROBES):
        units = torch.eye(width, dtype=like.dtype, device=like.device)[first : first + PROBES]
        both = logits_of(units), logits_of(LARGE[0] * units)  # of a head in parts every rank must be given the same
        logits = both[large]
        if logits is not None and table_VW is not None and bias_V is not None:
            columns = logits[:, :vocab_size].float().cpu() - bias_V
            table_VW[:, first : first + len(units)] = (columns / unit).t().to(like.dtype)
    if table_VW is None or bias_V is None:
        return None
    return _without_basis(_bits(table_VW), bias_V.numpy() if biased else None, 1.0, cap)


def _measured_cap(logits_of: Callable[[Tensor], Tensor | None], width: int, like: Tensor) -> float | None:
    """Return the bound of a head's logits, None if they grow with their hidden states."""
    one = torch.ones(1, width, dtype=like.dtype, device=like.device)
    most = []
    for factor in LARGE:
        logits = logits_of(one * factor)
        most.append(math.nan if logits is None else float(logits.float().abs().max()))
    return most[1] if most[1] < 2 * most[0] else None


def _bits(weight_VW: Tensor) -> NDArray[np.uint16]:
    """Return the bits of weights in bfloat16, some tokens at a time."""
    slices = (weight_VW[first : first + ROWS] for first in range(0, len(weight_VW), ROWS))
    return np.concatenate([as_bfloat16(rows.float().cpu().numpy()) for rows in slices])


def _without_basis(
    weight: NDArray[np.uint16], bias: FloatArray | None, scale: float, softcap: float | None
) -> TeacherHead:
    width = weight.shape[1]
    none = np.zeros((0, width), np.float32)
    return TeacherHead(weight, bias, scale, softcap, none, none.T, np.zeros(width, np.float32))


def packed_head(head: TeacherHead) -> bytes:
    """Return a head as bytes, for another process."""
    scalars = {"scale": np.array(head.scale), "softcap": np.array(head.softcap or math.inf)}
    return save({**{name: np.ascontiguousarray(array) for name, array in head.arrays().items()}, **scalars})


def unpacked_head(data: bytes) -> TeacherHead:
    """Invert ``packed_head``."""
    arrays = load(data)
    scale, cap = (float(arrays.pop(name)) for name in SCALARS)
    return TeacherHead(**{"bias": None, **arrays}, scale=scale, softcap=None if math.isinf(cap) else cap)  # type: ignore[arg-type]
