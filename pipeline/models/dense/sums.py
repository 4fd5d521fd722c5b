"""Sums over the vocabulary."""

import torch
from torch import Tensor


def log_sum_exp(x_nV: Tensor, scratch_nV: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp(x) over each row, (n, 1), in a scratch that may be x itself."""
    m = x_nV.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    return torch.sub(x_nV, m, out=scratch_nV).exp_().sum(1, keepdim=True).log_().add_(m)
