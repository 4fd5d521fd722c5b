"""Measure the fidelity certificate while the full distribution is in memory; cache/fidelity.py explains its figures.

Legend: n sampled positions, V vocabulary, H hidden width, K coordinates of the sketch, z logits, T temperature.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from logitcask.cache.fidelity import MOMENTS, SKETCH, VECTORS, FidelitySums, row_width
from logitcask.cache.labels import ExactTargets, SparseTargets, soft_labels
from logitcask.cache.layout import decode_targets, encode_targets
from logitcask.cache.manifest import LabelSettings

SMALLEST = 1e-30  # probability whose logarithm is taken


class CountSketch:
    """A random bucket and sign per coordinate; signed coordinates of one bucket are summed."""

    def __init__(self, size: int, random: np.random.Generator, device: torch.device) -> None:
        self._buckets = torch.from_numpy(random.integers(0, SKETCH, size)).to(device)
        self._signs = torch.from_numpy(random.integers(0, 2, size, dtype=np.int8) * 2 - 1).to(device, torch.float32)

    def __call__(self, values_nD: Tensor) -> Tensor:
        """Return the Fourier transform of the sketch of each row, (n, K // 2 + 1)."""
        sketch_nK = values_nD.new_zeros(len(values_nD), SKETCH).index_add_(1, self._buckets, values_nD * self._signs)
        spectrum: Tensor = torch.fft.rfft(sketch_nK)
        return spectrum


class Probe:
    """Sketches of gradients d h^T, for one vocabulary and width: TensorSketch (Pham and Pagh, KDD 2013).

    The convolution of the count sketches of d and h is a count sketch of their outer product, which is never formed.
    """

    def __init__(self, vocab_size: int, hidden_size: int, device: torch.device) -> None:
        random = np.random.Generator(np.random.Philox(key=0))
        self._sketch_logits = CountSketch(vocab_size, random, device)
        self._sketch_hidden = CountSketch(hidden_size, random, device)

    def measure(
        self,
        logits_nV: Tensor,
        hidden_nH: Tensor,
        targets: SparseTargets,
        label: LabelSettings,
        rebuilt: Callable[[ExactTargets], Iterator[Tensor]] | None = None,
    ) -> FidelitySums:
        """Return sums over n positions, from full logits, hidden states and the labels made from them.

        ``rebuilt`` yields the distributions (n, V) that exact labels stand for, temperature by temperature.
        """
        stored = decode_targets(encode_targets(targets, label), label)
        z_nV, h_nH = logits_nV.float(), hidden_nH.float()
        length_n = (h_nH**2).sum(1).double()
        hidden_nF = self._sketch_hidden(h_nH)
        table = np.zeros((len(label.temperatures), VECTORS, MOMENTS + SKETCH))
        kl_J = np.zeros(len(label.temperatures))
        estimates = rebuilt(stored) if rebuilt is not None and isinstance(stored, ExactTargets) else None
        for j, t in enumerate(label.temperatures):
            p_nV, q_nV = (z_nV / t).softmax(1), (z_nV / (2 * t)).softmax(1)
            gradient_nV = q_nV - p_nV
            exact_nK = None
            for vector in range(VECTORS):
                if vector == 0:
                    d_nV = gradient_nV
                else:
                    if vector == 2:
                        estimate_nV = _top_k(p_nV, label)
                    elif estimates is not None:
                        estimate_nV = next(estimates)
                        kl_J[j] = _divergence(p_nV, estimate_nV)
                    else:
                        estimate_nV = _estimate(stored, label, t, q_nV)
                    d_nV = (estimate_nV.sum(1, keepdim=True) - 1.0) * q_nV + p_nV - estimate_nV
                sketch_nK = torch.fft.irfft(self._sketch_logits(d_nV) * hidden_nF, n=SKETCH).double()
                exact_nK = sketch_nK if exact_nK is None else exact_nK
                square_n, cross_n = (d_nV**2).sum(1).double(), (d_nV * gradient_nV).sum(1).double()
                moments = (square_n @ length_n, cross_n @ length_n, (sketch_nK**2).sum(), (sketch_nK * exact_nK).sum())
                table[j, vector, :MOMENTS] = [float(moment) for moment in moments]
                table[j, vector, MOMENTS:] = sketch_nK.sum(0).cpu().numpy()
        row = np.concatenate([[float(len(z_nV))], table.reshape(-1), *([kl_J] if label.exact else [])])
        assert row.shape == (row_width(len(label.temperatures), exact=label.exact is not None),)
        return FidelitySums(row)


def _divergence(p_nV: Tensor, estimate_nV: Tensor) -> float:
    """Return the sum over positions of KL(p || estimate), in nats."""
    ratio_nV = p_nV.clamp_min(SMALLEST).log_().sub_(estimate_nV.clamp_min(SMALLEST).log_())
    return float((p_nV * ratio_nV).sum(dtype=torch.float64))


def _estimate(stored: SparseTargets, label: LabelSettings, t: float, q_nV: Tensor) -> Tensor:
    """Return the label's estimate of p, (n, V): from its draws or, if none, the bucket spread in proportion to q."""
    soft = soft_labels(stored, label.temperatures, t, "sampled" if label.tail_draws else "bucket")
    entries = soft.map(torch.from_numpy).to(q_nV.device)
    estimate_nV = torch.zeros_like(q_nV).scatter_add_(1, entries.ids, entries.weights)
    if label.tail_draws:
        return estimate_nV
    rest_nV = q_nV.scatter(1, entries.ids, 0.0)
    mass_n1 = entries.log_rest.exp()[:, None]
    return estimate_nV + mass_n1 * rest_nV / rest_nV.sum(1, keepdim=True).clamp_min(1e-30)


def _top_k(p_nV: Tensor, label: LabelSettings) -> Tensor:
    """Return the top-k of p, renormalized to sum to 1, (n, V), with k the number of entries of a label."""
    top = p_nV.topk(min(label.head_size + label.tail_draws, p_nV.shape[1]), dim=1)
    return torch.zeros_like(p_nV).scatter_(1, top.indices, top.values / top.values.sum(1, keepdim=True))
