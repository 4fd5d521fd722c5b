"""The basis in which hidden states are coded: transform coding in the metric of the tail's distribution.

A change d of a hidden state at a position changes the tail's shape by d' G d, G = W' (diag r - r r') W, in which r is
the distribution of the tail (Fisher's metric). Coefficients in the basis that diagonalizes both the mean of G and the
covariance of hidden states are uncorrelated, and the same step costs the same for all of them.

Legend: N positions of calibration, n of them, V vocabulary, W width, C coefficients kept, J temperatures, K tokens of
the head.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from logitcask.cache.exact.code import column_ranges, step_kinds, step_sizes
from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.exact.trellis import STATES
from logitcask.cache.labels import FloatArray
from logitcask.cache.manifest import STEP_KINDS, ExactCode, LabelSettings
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.teachers.exact.viterbi import nearest

CALIBRATED = 4096  # positions, or twice the width if that is more
MEASURED = 512  # of them, on which the metric is measured
BIASED = 2048  # other positions, on which the bias of tails is measured
FEWEST = 32  # of them with steps of a kind
MOST_BIAS = 64.0  # nats, of a position: only logits that overflow have more
SLICE = 128  # positions at a time
STEP = 21.0  # of a position that is all tail, at 0 bits and a width of 1; so the error is the same at any width
FLOOR = 1e-6  # of the mean eigenvalue, added to each
TRELLIS_FROM = 5  # bits: with fewer, most columns have too few values for a trellis to save anything
TRELLIS_STEP = 0.56  # of the step without a trellis, for about the same error


def calibration_positions(width: int) -> int:
    """Return the number of positions on which a basis is fitted."""
    return max(CALIBRATED, 2 * width)


def fitted(head: TeacherHead, hidden_NW: FloatArray, label: LabelSettings, bits: int) -> tuple[TeacherHead, ExactCode]:
    """Return the head with the basis fitted to these hidden states, and how many of its columns are kept."""
    hidden, step = torch.from_numpy(hidden_NW), STEP * 2.0**-bits / math.sqrt(hidden_NW.shape[1])
    trellis: Literal[4] | None = STATES if bits >= TRELLIS_FROM else None
    step *= TRELLIS_STEP if trellis else 1.0
    tails_NJ, metric_WW = _tails(head, hidden, label)
    steps_N = torch.from_numpy(step_sizes(tails_NJ.log().numpy(), step)).double()
    weights_N = (step / steps_N) ** 2
    centre_W = (weights_N[:, None] * hidden).sum(0) / weights_N.sum()
    scaled_NW = (hidden - centre_W) * (step / steps_N)[:, None]
    root, inverse = _roots(metric_WW)
    values, vectors = torch.linalg.eigh(root @ _floored(scaled_NW.t() @ scaled_NW / len(hidden)) @ root)
    order = values.argsort(descending=True)
    forward_WC, basis_CW = root @ vectors[:, order], vectors[:, order].t() @ inverse
    columns, counts = column_ranges((scaled_NW @ forward_WC / (2 * step if trellis else step)).numpy())
    kept = torch.from_numpy(columns)
    fitted_head = replace(
        head,
        forward=forward_WC[:, kept].float().contiguous().numpy(),
        basis=basis_CW[kept].float().contiguous().numpy(),
        centre=centre_W.float().numpy(),
    )
    return fitted_head, ExactCode(bits=bits, step=step, width=hidden.shape[1], columns=list(counts), trellis=trellis)


def tail_bias(head: TeacherHead, hidden: FloatArray, code: ExactCode, label: LabelSettings) -> list[list[float]]:
    """Return how far log p of tokens outside the head is above the teacher's, on average, by kind of step, (kinds, J).

    In logits of a rebuilt state, noise adds to what is there: their log-sum-exp is above the teacher's, and what has
    the same mass is lower. ``hidden`` (N, W): not those that the basis was fitted to, which it codes better.
    Kinds of fewer than ``FEWEST`` positions take the value of the kind before.
    """
    full, temperatures_J = _logits_of(head), torch.tensor(label.temperatures)

    def log_sums(z_nV: Tensor) -> Tensor:
        return torch.stack([(z_nV / t).logsumexp(1) for t in label.temperatures], 1)

    centre_W, forward_WC, basis_CW = (torch.from_numpy(each) for each in (head.centre, head.forward, head.basis))
    sums, counts = torch.zeros(STEP_KINDS, len(label.temperatures)), torch.zeros(STEP_KINDS)
    for first in range(0, len(hidden), SLICE):
        h_nW = torch.from_numpy(hidden[first : first + SLICE])
        z_nV = full.logits(h_nW)
        ids_nK = z_nV.topk(min(label.head_size, z_nV.shape[1] - 1)).indices
        log_tail_nJ = log_sums(z_nV.scatter(1, ids_nK, -torch.inf))
        steps_n = step_sizes((log_tail_nJ - log_sums(z_nV)).numpy(), code.step)
        steps_n1 = torch.from_numpy(steps_n)[:, None]
        values_nC = (h_nW - centre_W) @ forward_WC / steps_n1
        codes_nC = nearest(values_nC).float() if code.trellis else values_nC.round()
        rebuilt_nV = full.logits(codes_nC * steps_n1 @ basis_CW + centre_W)
        error_n = (rebuilt_nV - z_nV).scatter_(1, ids_nK, 0.0).sum(1) / (z_nV.shape[1] - ids_nK.shape[1])
        rebuilt_nV.scatter_(1, ids_nK, -torch.inf)
        bias_nJ = error_n[:, None] / temperatures_J - (log_sums(rebuilt_nV) - log_tail_nJ)
        kinds_n = torch.from_numpy(step_kinds(steps_n, code.step))
        sums.index_add_(0, kinds_n, bias_nJ.nan_to_num().clamp(-MOST_BIAS, MOST_BIAS))
        counts += torch.bincount(kinds_n, minlength=STEP_KINDS)
    rows = [[0.0] * sums.shape[1]]
    for count, total_J in zip(counts.tolist(), sums, strict=True):
        rows.append((total_J / count).tolist() if count >= FEWEST else rows[-1])
    return rows[1:]


def _logits_of(head: TeacherHead) -> LMHead:
    bias = None if head.bias is None else torch.from_numpy(head.bias)
    return LMHead(torch.from_numpy(head.weights()), bias, head.scale, head.softcap)


def _tails(head: TeacherHead, hidden_NW: Tensor, label: LabelSettings) -> tuple[Tensor, Tensor]:
    """Return the masses outside the heads (N, J), and the mean metric (W, W), of MEASURED positions evenly spaced."""
    full = _logits_of(head)
    weights_VW = full.weight
    every = max(1, len(hidden_NW) // MEASURED)
    tails, total, spread_V, metric_WW = [], 0.0, torch.zeros(len(weights_VW)), torch.zeros(2 * hidden_NW.shape[1:])
    for first in range(0, len(hidden_NW), SLICE):
        z_NV = full.logits(hidden_NW[first : first + SLICE])
        ids_NK, masses = z_NV.topk(min(label.head_size, z_NV.shape[1] - 1)).indices, []
        chosen = slice(-first % every, None, every)
        for t in label.temperatures:
            r_NV = (z_NV / t).softmax(1).scatter_(1, ids_NK, 0.0)
            mass_N = r_NV.sum(1)
            masses.append(mass_N)
            r_nV, w_n = r_NV[chosen] / mass_N[chosen, None].clamp_min(1e-30), mass_N[chosen]
            total += float(w_n.sum())
            spread_V += w_n @ r_nV
            mean_nW = r_nV @ weights_VW
            metric_WW -= (mean_nW * w_n[:, None]).t() @ mean_nW
        tails.append(torch.stack(masses, 1))
    metric_WW += (weights_VW * spread_V[:, None]).t() @ weights_VW
    if total == 0.0:  # the heads hold all
        return torch.cat(tails), torch.eye(len(metric_WW), dtype=torch.float64)
    return torch.cat(tails), metric_WW.double() / total


def _floored(matrix: Tensor) -> Tensor:
    """Return a matrix with a little added to its diagonal, so that no eigenvalue is 0."""
    return matrix + FLOOR * matrix.diagonal().mean().clamp_min(1e-30) * torch.eye(len(matrix), dtype=matrix.dtype)


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a symmetric positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(_floored(metric))
    roots = values.clamp_min(values.max() * 1e-12).sqrt()
    return (vectors * roots) @ vectors.t(), (vectors / roots) @ vectors.t()
