"""The fidelity certificate: against dense float64 arithmetic without a sketch, in the cache, shown and required."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcask.cache import fidelity
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.fidelity import BATCH, FidelitySums, figures, row_width, unsound
from logitcask.cache.labels import SparseTargets, soft_labels
from logitcask.cache.layout import decode_targets, encode_targets
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.cache.report.label_figures import fidelity_of
from logitcask.cache.verify import verify
from logitcask.pipeline.teachers.fidelity_probe import Probe
from logitcask.pipeline.teachers.sparsify import sparsify, uniform_draws
from tests.support.runs import train, train_settings
from tests.support.tiny import FloatArray64, make_cache

T = (1.0, 2.0)
V, H = 120, 16


def settings(head: int, draws: int) -> LabelSettings:
    return LabelSettings(
        vocab_size=V, head_size=head, tail_draws=draws, temperatures=list(T), seed=0, fidelity_positions=512
    )


def problem(n: int, head: int, draws: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, SparseTargets]:
    """Return logits (n, V), the hidden states (n, H) that give them, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=generator) + 0.7
    logits = hidden @ torch.randn(H, V, generator=generator) * 0.5
    gold, uniforms = torch.zeros(n, dtype=torch.int64), torch.from_numpy(uniform_draws(seed, 0, n, draws))
    return logits, hidden, sparsify(logits, gold, uniforms, head, T)


def softmax(x: FloatArray64) -> FloatArray64:
    powers = np.exp(x - x.max(1, keepdims=True))
    probabilities: FloatArray64 = powers / powers.sum(1, keepdims=True)
    return probabilities


def dense(
    logits: torch.Tensor, hidden: torch.Tensor, targets: SparseTargets, label: LabelSettings, t: float
) -> list[FloatArray64]:
    """Return every position's exact gradient, the label's error and that of renormalized top-k, each (n, V * H)."""
    z, h = logits.double().numpy(), hidden.double().numpy()
    p, q = softmax(z / t), softmax(z / (2 * t))
    stored = soft_labels(decode_targets(encode_targets(targets), label), T, t, "sampled")
    estimate, top = np.zeros_like(p), np.zeros_like(p)
    for row in range(len(z)):
        np.add.at(estimate[row], stored.ids[row], stored.weights[row])
        best = np.argsort(-p[row])[: label.head_size + label.tail_draws]
        top[row, best] = p[row, best] / p[row, best].sum()
    weight = estimate.sum(1, keepdims=True)
    errors = ((weight * q - estimate) - (q - p), p - top)
    return [(d[:, :, None] * h[:, None, :]).reshape(len(z), -1) for d in (q - p, *errors)]


@pytest.mark.parametrize(("head", "draws"), [(2, 4), (0, 8)])
def test_sums_and_figures_are_those_of_the_dense_gradients(
    head: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "SKETCH", 4096)  # so that the sketch's own error is small
    monkeypatch.setattr("logitcask.pipeline.teachers.fidelity_probe.SKETCH", 4096)
    n, label = 300, settings(head, draws)
    logits, hidden, targets = problem(n, head, draws)
    sums = Probe(V, H, torch.device("cpu")).measure(logits, hidden, targets, label)
    measured = figures(sums, len(T))
    assert measured is not None
    for j, t in enumerate(T):
        gradient, *errors = dense(logits, hidden, targets, label, t)
        table = sums.row[1:].reshape(len(T), 3, -1)[j]
        for vector, each in enumerate((gradient, *errors)):
            np.testing.assert_allclose(table[vector, :2], [(each**2).sum(), (each * gradient).sum()], rtol=1e-3)
        for which, error in enumerate(errors):
            batch = expected_products(gradient, error)
            cosine = (batch["gg"] + batch["ge"]) / math.sqrt(
                batch["gg"] * (batch["gg"] + 2 * batch["ge"] + batch["ee"])
            )
            assert measured[j][which].degrees == pytest.approx(math.degrees(math.acos(cosine)), rel=0.1)
            exact = pairs(gradient, gradient)
            assert measured[j][which].noise == pytest.approx(
                math.sqrt(((error**2).sum() / n - max(0, pairs(error, error))) / BATCH / batch["gg"]), rel=0.1
            )
            if which == 1:
                assert measured[j][which].bias == pytest.approx(math.sqrt(pairs(error, error) / exact), rel=0.1)


def pairs(a: FloatArray64, b: FloatArray64) -> float:
    """Return the mean inner product over pairs of different positions: that of the means, without noise."""
    n = len(a)
    return float((a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1)))


def expected_products(gradient: FloatArray64, error: FloatArray64) -> dict[str, float]:
    """Return the expected inner products of the means over BATCH positions."""
    products = {}
    for name, a, b in (("gg", gradient, gradient), ("ge", gradient, error), ("ee", error, error)):
        between = pairs(a, b) if name != "ee" else max(0.0, pairs(a, b))
        products[name] = between * (1 - 1 / BATCH) + float((a * b).sum()) / len(a) / BATCH
    return products


def test_sums_add_over_positions() -> None:
    label = settings(2, 4)
    logits, hidden, targets = problem(40, 2, 4)
    probe = Probe(V, H, torch.device("cpu"))
    first, second = (
        probe.measure(logits[cut], hidden[cut], targets[cut], label) for cut in (slice(0, 13), slice(13, 40))
    )
    whole = probe.measure(logits, hidden, targets, label)
    np.testing.assert_allclose((first + second).row, whole.row, rtol=1e-5, atol=1e-4)


def test_a_biased_label_is_distinguished_from_an_unbiased_one() -> None:
    label = settings(2, 6)
    logits, hidden, targets = problem(512, 2, 6)
    probe = Probe(V, H, torch.device("cpu"))
    honest = figures(probe.measure(logits, hidden, targets, label), len(T))
    dropped = replace(targets, tail_counts=np.zeros_like(targets.tail_counts))
    cut = figures(probe.measure(logits, hidden, dropped, label), len(T))
    assert honest is not None
    assert cut is not None
    for j in range(len(T)):
        assert honest[j][0].bias < honest[j][0].bias_floor
        assert cut[j][0].bias > 1.5 * cut[j][0].bias_floor
        assert honest[j][1].bias > 2 * honest[j][1].bias_floor, "renormalized top-k is biased"


def test_a_label_of_the_whole_vocabulary_is_exact() -> None:
    logits, hidden, targets = problem(64, V, 0)
    rows = figures(Probe(V, H, torch.device("cpu")).measure(logits, hidden, targets, settings(V, 0)), len(T))
    assert rows is not None
    assert all(label.degrees < 2.5 for label, _ in rows), "except for storage rounding"


def test_the_bucket_is_measured_if_there_are_no_draws() -> None:
    logits, hidden, targets = problem(256, 4, 0)
    rows = figures(Probe(V, H, torch.device("cpu")).measure(logits, hidden, targets, settings(4, 0)), len(T))
    assert rows is not None
    assert all(0 < label.bias < top.bias for label, top in rows), "a true bucket is closer than renormalizing"


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_positions_give_no_figures(n: int) -> None:
    logits, hidden, targets = problem(4, 2, 4)
    sums = FidelitySums.zeros(settings(2, 4).temperatures)
    if n:
        sums += Probe(V, H, torch.device("cpu")).measure(logits[:n], hidden[:n], targets[:n], settings(2, 4))
    assert figures(sums, len(T)) is None


def test_every_shard_carries_its_share(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shard_positions=64, fidelity_positions=50)
    reader = CacheReader(cache)
    count = reader.manifest.shards.count
    assert {reader.shard_fidelity(index).positions for index in range(count)} == {math.ceil(50 / count)}
    every = make_cache(tmp_path, tmp_path / "teacher", output=tmp_path / "every", shard_positions=64)
    info = describe(every)
    assert info.fidelity_positions == info.manifest.data.positions, "512 are more than the data has"
    assert verify(every).problems == []


def test_batches_change_the_certificate_only_by_rounding(tmp_path: Path) -> None:
    first = make_cache(tmp_path, shard_positions=10_000)
    second = make_cache(tmp_path, tmp_path / "teacher", output=tmp_path / "b", shard_positions=10_000, batch_size=1)
    rows = [CacheReader(cache).shard_fidelity(0).row for cache in (first, second)]
    assert rows[0][0] == rows[1][0] > 0
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-2, atol=1e-3 * np.abs(rows[0]).max())


def test_the_certificate_is_shown(tmp_path: Path) -> None:
    info = describe(make_cache(tmp_path, shard_positions=64))
    assert [at.temperature for at in info.fidelity] == [1.0, 1.5, 2.0]
    text = render(info)
    assert f"measured on {info.fidelity_positions} positions" in text
    assert text.count("top-12 renormalised") == 3
    assert f"angle {info.fidelity[0].label.degrees:5.2f} degrees" in text
    none = describe(make_cache(tmp_path, tmp_path / "teacher", output=tmp_path / "none", fidelity_positions=0))
    assert "too few positions were measured (0)" in render(none)


def test_a_run_can_require_a_minimum(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shard_positions=64)
    rows = figures(fidelity_of(CacheReader(cache), range(CacheReader(cache).manifest.shards.count)), 3)
    assert rows is not None
    cosine = rows[2][0].cosine
    train(cache, tmp_path / "good", temperature=2.0, min_fidelity=cosine - 1e-6)
    with pytest.raises(LogitcaskError, match=rf"not good enough: at T=2 .* is {cosine:.4f} .*richer --preset"):
        train(cache, tmp_path / "bad", temperature=2.0, min_fidelity=min(1.0, cosine + 1e-6))
    none = make_cache(tmp_path, tmp_path / "teacher", output=tmp_path / "none", fidelity_positions=0)
    with pytest.raises(LogitcaskError, match=r"measured on 0 positions, too few .*--fidelity-positions"):
        train(none, tmp_path / "none_run", min_fidelity=0.5)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("other", [{"tail": "bucket"}, {"distillation_type": "output"}])
def test_a_minimum_is_refused_for_other_losses(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--min-fidelity applies to the forward KL"):
        train_settings(tmp_path / "cache", tmp_path / "run", min_fidelity=0.5, **other)


@pytest.mark.parametrize(
    ("at", "value", "rule"),
    [
        (0, 99, "measured on 99 positions, but the shard has 10"),
        (0, -1, "measured on -1 positions"),
        (1, np.nan, "finite"),
        (7, np.inf, "finite"),
        (1, -1, "a sum of squares is negative"),
        (3, -1, "a sum of squares is negative"),
    ],
)
def test_an_impossible_row_is_refused(at: int, value: float, rule: str) -> None:
    row = np.ones(row_width(2))
    row[at] = value
    assert rule in str(unsound(FidelitySums(row), 2, 10))
    assert unsound(FidelitySums(np.ones(row_width(2))), 2, 10) is None
    assert unsound(FidelitySums(np.ones(3)), 2, 10) is not None
