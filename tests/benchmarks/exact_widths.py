"""Exact labels of wide teachers: bytes, errors and the time of fitting a basis, of random states by width.

Isotropic states, which no basis makes smaller, and states whose covariance has eigenvalues in proportion to 1 / i, as
those of trained models fall off; the head's weights are random, of ``VOCABULARY`` tokens, and logits have a standard
deviation of ``LOGITS``. Bytes are those of the arrays of hidden states at 4 bits, of ``CODED`` positions; errors those
of ``exact_codes`` over 300 positions, and beside them those of sparse labels with their bytes.
Run as ``python -m tests.benchmarks.exact_widths RESULTS.json WIDTH...``, each width into the same file. On a core
1024 takes half a minute, 4096 four and 8192 half an hour, of which most goes into the basis, with the cube of the
width.

Predicted before the run: isotropic states take 3.5 bits per feature at any width, the others about 2.5 and less with
the width, and the gradient's error at 4 bits is about the same at every width.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache.exact.head import decode
from logitcask.cache.labels import ExactTargets, FloatArray
from logitcask.pipeline.teachers.exact.fit import calibration_positions, fitted
from tests.benchmarks.exact_codes import (
    MEASURED,
    SPARSE,
    TEMPERATURES,
    Truth,
    distribution,
    exact_labels,
    plain_head,
    settings,
    sparse_figures,
    sparse_labels,
    stored,
)

VOCABULARY, LOGITS, CODED, BITS = 8192, 3.0, 1024, 4
SPECTRA = ("isotropic", "1/i")


def random_teacher(width: int, spectrum: str, positions: int) -> tuple[FloatArray, FloatArray]:
    """Return weights of a head (V, W) and hidden states (positions, W) of variance 1 per feature on average."""
    chance = np.random.default_rng(width)
    weight = (LOGITS / math.sqrt(width) * chance.standard_normal((VOCABULARY, width))).astype(np.float32)
    eigenvalues = np.ones(width) if spectrum == "isotropic" else 1 / np.arange(1, width + 1)
    scale = np.sqrt(eigenvalues / eigenvalues.mean()).astype(np.float32)  # the weights are isotropic: no need to turn
    return weight, chance.standard_normal((positions, width), dtype=np.float32) * scale


def measure(width: int, spectrum: str) -> dict[str, Any]:
    """Return the figures of a width."""
    fit = calibration_positions(width)
    weight, states = random_teacher(width, spectrum, fit + CODED)
    label, unknown = settings(VOCABULARY), states[fit:]
    began = time.process_time()
    head, code = fitted(plain_head(weight), states[:fit], label, BITS)
    seconds = time.process_time() - began
    exact = label.model_copy(update={"exact": code})
    read, sizes = stored(exact_labels(head, exact, unknown, sparse_labels(weight, unknown, 8, 0)), exact)
    truth = Truth(weight, unknown[:MEASURED], TEMPERATURES)
    part = read[:MEASURED]
    assert isinstance(part, ExactTargets)
    z_NV = head.logits(decode(part, head))

    def ours(rows: slice, t: float) -> FloatArray:
        return distribution(part[rows], z_NV[rows], t)

    hidden = sum(size for name, size in sizes.items() if name.startswith("hidden_"))
    errors = {t: found["gradient"] for t, found in truth.errors(ours).items()}
    return {
        "bytes": sum(sizes.values()), "hidden": hidden, "bits per feature": 8 * hidden / width,
        "columns": list(code.columns), "seconds of fitting": round(seconds, 1), **errors,
        "sparse": {f"{k} + {m}": sparse_figures(weight, unknown, truth, k, m) for k, m in SPARSE},
    }  # fmt: skip


def main() -> None:
    """Measure, and write the figures."""
    file = Path(sys.argv[1])
    for width in map(int, sys.argv[2:]):
        for spectrum in SPECTRA:
            figures = json.loads(file.read_text()) if file.exists() else {}
            figures[f"{width} {spectrum}"] = measure(width, spectrum)
            file.write_text(json.dumps(figures, indent=1) + "\n")
            print(width, spectrum, json.dumps(figures[f"{width} {spectrum}"]), flush=True)


if __name__ == "__main__":
    main()
