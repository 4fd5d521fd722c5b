"""A skewed KL, KL(teacher || s * teacher + (1 - s) * student), for `logitcask train --loss example_loss:skewed_kl`."""

import torch
from torch import Tensor

from logitcask import SoftLabels

SKEW = 0.1


def skewed_kl(logits: Tensor, labels: SoftLabels[Tensor]) -> Tensor:
    """Return T² times the skewed KL (n,), from the student's logits (n, V) and the labels of the same n positions."""
    t = labels.temperature
    log_q = torch.log_softmax(logits / t, dim=1).gather(1, labels.ids)  # (n, S), at the label's entries
    mixed = torch.logaddexp(labels.log_probs + torch.tensor(SKEW).log(), log_q + torch.tensor(1 - SKEW).log())
    loss: Tensor = t * t * (labels.weights * (labels.log_probs - mixed)).sum(1)
    return loss
