"""Hidden states to the codes of exact labels, on whatever device the rows are, and back to distributions.

Legend: N target positions, K head tokens, J temperatures, V vocabulary, W width of the hidden states, C coefficients
kept of them.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from logitcask.cache.exact.code import largest_codes
from logitcask.cache.exact.head import TeacherHead, decode
from logitcask.cache.exact.odds import stored_tail_mass
from logitcask.cache.labels import ExactTargets, SparseTargets
from logitcask.cache.layout import EXACT_SCALE, position_steps
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.teachers.exact.viterbi import nearest

TOKENS = 8192  # rows of the head in float32 at a time
FARTHEST = 2**14  # steps from the centre: a hidden state beyond is cut, which no sound one is


class HiddenCoder:
    """Codes hidden states in the basis of a cache."""

    def __init__(self, head: TeacherHead, label: LabelSettings, device: torch.device) -> None:
        assert label.exact is not None
        self._head, self._label, self._code = head, label, label.exact
        self._centre = torch.from_numpy(head.centre).to(device)
        self._forward = torch.from_numpy(head.forward).to(device)  # (W, C)
        most_C = torch.from_numpy(2.0 * largest_codes(self._code.columns) - 4).clamp_max(FARTHEST - 4)
        self._most = most_C.float().to(device)  # on a trellis

    def encode(self, hidden_NW: Tensor, targets: SparseTargets) -> ExactTargets:
        """Return the labels with the coded hidden states of their positions."""
        of_steps = position_steps(stored_tail_mass(targets.log_tail_mass, EXACT_SCALE), self._label)
        values_NC = (hidden_NW.float() - self._centre) @ self._forward
        values_NC /= torch.from_numpy(of_steps["steps"]).to(values_NC.device)[:, None]
        # cut where their column ends: codes cut when they are packed would put those after them on another ruler
        codes_NC = nearest(values_NC.clamp(-self._most, self._most)) if self._code.trellis else values_NC.round_()
        codes_NC = codes_NC.clamp_(-FARTHEST, FARTHEST).to(torch.int16)
        return ExactTargets(**vars(targets), codes=codes_NC.cpu().numpy(), **of_steps)

    def rebuilt(self, targets: ExactTargets) -> Iterator[Tensor]:
        """Yield the distributions that labels stand for, (N, V), at each stored temperature in turn."""
        z_NV = self._logits(targets)
        ids_NK, l_NK, log_rest_NJ, partition_NJ = (
            torch.from_numpy(np.ascontiguousarray(array)).to(z_NV.device)
            for array in (
                targets.head_ids.astype(np.int64),
                targets.head_logprobs,
                targets.log_tail_mass,
                targets.log_partition,
            )
        )
        for j, t in enumerate(self._label.temperatures):
            tail_NV = (z_NV / t).scatter_(1, ids_NK, -torch.inf).log_softmax(1) + log_rest_NJ[:, j, None]
            head_NK = (l_NK / t - partition_NJ[:, j, None]).exp()
            yield tail_NV.exp_().nan_to_num_(0.0).scatter_(1, ids_NK, head_NK)

    def _logits(self, targets: ExactTargets) -> Tensor:
        """Return the logits of the rebuilt hidden states, (N, V), some tokens at a time."""
        head, device = self._head, self._centre.device
        hidden_NW = torch.from_numpy(decode(targets, head)).to(device)
        z_NV = torch.empty(len(targets), len(head.weight), device=device)
        for first in range(0, z_NV.shape[1], TOKENS):
            rows = slice(first, first + TOKENS)
            weight = torch.from_numpy(head.weight[rows].view(np.int16)).to(device).view(torch.bfloat16).float()
            bias = None if head.bias is None else torch.from_numpy(head.bias[rows]).to(device)
            z_NV[:, rows] = LMHead(weight, bias, head.scale, head.softcap).logits(hidden_NW)
        return z_NV
