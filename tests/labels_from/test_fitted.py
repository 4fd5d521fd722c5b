"""DistillKit's fitted presets: what a fit gives too much is scaled away, what it gives too little is raised."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from numpy.typing import NDArray

from logitcask.cache.layout import HEAD_SCALE, ODDS_SCALE
from logitcask.pipeline.labels_from.distillkit import Compression, decompress
from tests.labels_from.test_formats import pack
from tests.labels_from.test_import import TEXTS, bring, labels_of, tokenizer

__all__ = ["bring", "tokenizer"]  # fixtures
K, VOCAB = 96, 300
FITTED = {
    "d": VOCAB,
    "k": K,
    "exact_k": 0,
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "bfloat16",
    "residual_bins": [],
    "delta_encoding": False,
}


def fit(values: torch.Tensor) -> torch.Tensor:
    """Return the coefficients of the least squares of rows (N, K) over their ranks, packed as DistillKit does."""
    ranks = torch.arange(K, dtype=torch.float64)
    terms = torch.stack([torch.ones(K), ranks, ranks**2, ranks.sqrt()], dim=1)
    solved = torch.linalg.lstsq(terms.expand(len(values), -1, -1), values[:, :, None].double()).solution
    packed: torch.Tensor = solved[:, :, 0].bfloat16().view(torch.uint8)
    return packed


def filled(row: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return log-probabilities of a row and outside it, where none is below that of each token outside."""
    low, high = np.log(1e-12), 0.0
    for _ in range(60):
        level = (low + high) / 2
        too_much = np.exp(np.maximum(row, level)).sum() + (VOCAB - K) * np.exp(level) > 1
        low, high = (low, level) if too_much else (level, high)
    return np.maximum(row, low), float(low + np.log(VOCAB - K))


def test_fitted_rows_become_distributions(bring: Any, tmp_path: Path) -> None:
    """Rows that sum to more than 1 are scaled to 1; entries below the tokens outside share with these."""
    folder = tmp_path / "capture"
    folder.mkdir()
    rows, decoded = [], []
    for text in TEXTS:
        ids, values = text.top(K)
        packed = fit(torch.from_numpy(values[:-1]))
        decoded.append(decompress(packed, Compression.model_validate(FITTED)).double().numpy())
        rows.append(
            {
                "input_ids": text.ids.tolist(),
                "compressed_logprobs": packed.tolist(),
                "bytepacked_indices": pack(ids[:-1], 9),
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(FITTED))
    bring(folder, format="distillkit")
    scaled, raised = [], []
    for (_, _, targets), text, fitted in zip(labels_of(tmp_path / "cache"), TEXTS, decoded, strict=True):
        order = np.argsort(-fitted, axis=1, kind="stable")
        np.testing.assert_array_equal(targets.head_ids, np.take_along_axis(text.top(K)[0][:-1], order, axis=1))
        for n, row in enumerate(np.take_along_axis(fitted, order, axis=1)):
            mass = np.exp(row).sum()
            want, want_rest = filled(row) if mass < 1 else (row - np.log(mass), -np.inf)
            np.testing.assert_allclose(targets.head_logprobs[n], want, atol=HEAD_SCALE / 2 + 1e-4)
            rest = float(targets.log_tail_mass[n, 0])
            if mass >= 1:
                assert rest == -np.inf
                scaled.append(np.log(mass))
            else:
                odds, want_odds = (value - np.log(-np.expm1(value)) for value in (rest, want_rest))
                np.testing.assert_allclose(odds, want_odds, atol=ODDS_SCALE / 2 + 1e-3)
                raised.append(want[-1] - row[-1])
    assert max(scaled) > 0.3  # more than rounding
    assert max(raised) > 1.0
