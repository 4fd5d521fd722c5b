"""Exact labels: the basis in which hidden states are coded, and their codes, on whatever device the rows are.

Legend: N target positions, V vocabulary, W width of the hidden states, C coefficients kept.
"""

import numpy as np
import torch
from torch import Tensor

from logitcask.cache.exact.head import TeacherHead, decode, quantised
from logitcask.cache.labels import ExactTargets, FloatArray, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.head import LMHead

TOKENS = 8192  # rows of the head in float32 at a time
MAX_CODE = {bits: 2 ** (bits - 1) - 1 for bits in range(2, 9)}


class HiddenCoder:
    """Codes hidden states with the basis of a cache."""

    def __init__(self, head: TeacherHead, label: LabelSettings, device: torch.device) -> None:
        assert label.exact is not None
        self._head, self._temperatures = head, label.temperatures
        self._largest = MAX_CODE[label.exact.bits]
        self._centre = torch.from_numpy(head.centre).to(device)
        self._inverse = torch.linalg.pinv(torch.from_numpy(head.basis).double()).float().to(device)  # (W, C)

    def rebuilt(self, targets: ExactTargets, j: int) -> Tensor:
        """Return the distributions at the j-th stored temperature that labels stand for, (N, V)."""
        hidden_NW = torch.from_numpy(decode(targets, self._head)).to(self._centre.device)
        z_NV = torch.empty(len(targets), len(self._head.weight), device=hidden_NW.device)
        for first in range(0, z_NV.shape[1], TOKENS):
            rows = slice(first, first + TOKENS)
            weights = torch.from_numpy(self._head.weights(rows)).to(hidden_NW.device)
            z_NV[:, rows] = hidden_NW @ weights.t()
        z_NV = self._shaped(z_NV)
        t = self._temperatures[j]
        ids_NK, l_NK, log_rest_N, partition_NJ = (
            torch.from_numpy(np.ascontiguousarray(array)).to(hidden_NW.device)
            for array in (
                targets.head_ids.astype(np.int64), targets.head_logprobs, targets.log_tail_mass[:, j],
                targets.log_partition[:, j],
            )
        )  # fmt: skip
        tail_NV = (z_NV / t).scatter_(1, ids_NK, -torch.inf).log_softmax(1) + log_rest_N[:, None]
        return tail_NV.exp_().nan_to_num_(0.0).scatter_(1, ids_NK, (l_NK / t - partition_NJ[:, None]).exp())

    def _shaped(self, raw_NV: Tensor) -> Tensor:
        """Apply bias, scale and soft-cap in place."""
        if self._head.bias is not None:
            raw_NV += torch.from_numpy(self._head.bias).to(raw_NV.device)
        raw_NV *= self._head.scale
        cap = self._head.softcap
        return raw_NV if cap is None else raw_NV.div_(cap).tanh_().mul_(cap)

    def encode(self, hidden_NW: Tensor, targets: SparseTargets) -> ExactTargets:
        """Return the labels with the coded hidden states of their positions."""
        values_NC = (hidden_NW.float() - self._centre) @ self._inverse
        steps_N1 = values_NC.abs().amax(1, keepdim=True).clamp_min(1e-30) / self._largest
        codes_NC = (values_NC / steps_N1).round().to(torch.int8)
        return ExactTargets(**vars(targets), codes=codes_NC.cpu().numpy(), steps=steps_N1[:, 0].cpu().numpy())


def stored_head(head: LMHead, vocab_size: int) -> TeacherHead:
    """Return a model's head as a cache keeps it, without a basis; rows beyond the vocabulary are dropped."""

    def rows(chosen: slice) -> FloatArray:
        values: FloatArray = head.weight[chosen].detach().float().cpu().numpy()
        return values

    weight, scale = quantised(rows, vocab_size)
    width = weight.shape[1]
    return TeacherHead(
        weight=weight,
        weight_scale=scale,
        bias=None if head.bias is None else head.bias[:vocab_size].detach().float().cpu().numpy(),
        scale=head.scale,
        softcap=head.softcap,
        basis=np.zeros((0, width), np.float32),
        centre=np.zeros(width, np.float32),
    )
