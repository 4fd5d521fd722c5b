"""Training on exact labels: the same as with the teacher in memory, at any temperature and for any divergence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcask as lc
from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.fidelity import divergences
from logitcask.cache.labels import ExactTargets
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.label_figures import fidelity_of
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.evaluate.on_cache import evaluate_on_cache
from logitcask.pipeline.labels_from.export import export_labels
from logitcask.pipeline.models.head import read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.pages.contents import student_rows
from tests.support.runs import history, losses, train
from tests.support.tiny import make_cache, make_teacher
from tests.train.test_train import dense

EXACT: dict[str, Any] = {"preset": "exact", "head_size": 4, "tail_draws": 0, "hidden_bits": 8}
WHOLE: dict[str, object] = {"batch_size": 24, "eval_fraction": 0.0, "max_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its cache of exact labels, and a cache of sparse ones."""
    folder = tmp_path_factory.mktemp("exact")
    make_cache(folder, **EXACT)
    make_cache(folder, folder / "teacher", output=folder / "sparse", head_size=4, tail_draws=8)
    return folder


@pytest.mark.parametrize(
    ("t", "divergence"),
    [(1.0, "forward-kl"), (3.3, "forward-kl"), (2.0, "reverse-kl"), (0.8, "jsd"), (2.0, "tvd"), (1.7, "own")],
)
def test_steps_equal_those_with_the_teacher_in_memory(
    stock: Path, tmp_path: Path, t: float, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of two steps, the second after an update, up to what 8 bits leave out."""
    monkeypatch.chdir(Path(__file__).parent.parent / "library")
    how: dict[str, object] = {"loss": "example_loss:skewed_kl"} if divergence == "own" else {"divergence": divergence}
    how |= {"temperature": t, **WHOLE}
    exact = train(stock / "cache", tmp_path / "exact", **how)
    data = {"train_data": str(stock / "train.jsonl"), "teacher_model": str(stock / "teacher"), "max_seq_length": 64}
    online = train(None, tmp_path / "online", **data, **how)
    for name in ("total_loss", "hard_loss", "soft_loss", "grad_norm"):
        assert losses(exact, name) == pytest.approx(losses(online, name), rel=2e-3), name


def test_other_caches_take_no_other_temperature(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match=r"--temperature 3.3 is not stored"):
        train(stock / "sparse", tmp_path / "run", temperature=3.3, **WHOLE)
    with pytest.raises(LogitcaskError, match="reverse-kl requires --tail bucket, or a cache of exact labels"):
        train(stock / "sparse", tmp_path / "run", divergence="reverse-kl", **WHOLE)


def test_schedules_follow_the_line_itself(stock: Path, tmp_path: Path) -> None:
    run = train(stock / "cache", tmp_path / "run", **{**WHOLE, "max_steps": 4, "temperature": "3:1.2"})
    assert [line["temperature"] for line in history(run)] == pytest.approx([3.0, 2.4, 1.8, 1.2])


def test_positions_where_the_teacher_is_least_certain(stock: Path, tmp_path: Path) -> None:
    """The soft loss is that of the positions of highest entropy at T, by the teacher's own distributions."""
    how = {**WHOLE, "max_steps": 1, "temperature": 2.5, "learning_rate": 1e-12, "weight_decay": 0.0}
    run = train(stock / "cache", tmp_path / "run", select="teacher-entropy:0.25", **how)
    losses_of, counts = [], []
    for index in range(24):
        log_p, _ = dense(stock / "teacher", stock / "cache", [index], 2.5)
        log_q, _ = dense(run / "final", stock / "cache", [index], 2.5)
        entropy, kl = -(log_p.exp() * log_p).sum(1), (log_p.exp() * (log_p - log_q)).sum(1)
        counts.append(-(-len(kl) // 4))
        losses_of.append(kl[entropy.topk(counts[-1]).indices].sum())
    expected = 2.5**2 * float(torch.stack(losses_of).sum()) / sum(counts)
    assert losses(run, "soft_loss") == pytest.approx([expected], rel=2e-2)


def test_mixtures(stock: Path, tmp_path: Path) -> None:
    """Of exact labels of one teacher, whatever their heads and bits; not of two kinds or teachers."""
    other = make_cache(
        tmp_path, stock / "teacher", **{**EXACT, "head_size": 2, "hidden_bits": 4, "temperatures": "1,3"}
    )
    mixed = [f"{stock / 'cache'}:0.5", f"{other}:0.5"]
    run = train(mixed, tmp_path / "run", temperature=4.0, divergence="jsd", **{**WHOLE, "batch_size": 48})
    one = train(stock / "cache", tmp_path / "one", temperature=4.0, divergence="jsd", **WHOLE)
    assert losses(run, "soft_loss")[0] == pytest.approx(losses(one, "soft_loss")[0], rel=2e-2)  # the same texts twice
    cache, coarse = lc.open(stock / "cache"), lc.open(other)
    assert coarse.reader.teacher_head().basis.shape < cache.reader.teacher_head().basis.shape
    mix, model = lc.mix([cache, coarse], [0.5, 0.5]), load_causal_lm(str(stock / "teacher"), dtype=torch.float32)
    ours, alone = mix.collator()([mix.dataset()[47]]), coarse.collator()([coarse.dataset()[23]])
    torch.testing.assert_close(lc.kd_loss(model, ours), lc.kd_loss(model, alone))  # of the shorter code alone
    with pytest.raises(CacheMismatchError, match="sparse: has no exact labels: mix caches of one kind"):
        train([f"{stock / 'cache'}:0.5", f"{stock / 'sparse'}:0.5"], tmp_path / "no", **WHOLE)
    stranger = make_cache(tmp_path, make_teacher(tmp_path / "stranger", seed=5), output=tmp_path / "strange", **EXACT)
    with pytest.raises(CacheMismatchError, match="of another teacher than those of"):
        train([f"{stock / 'cache'}:0.5", f"{stranger}:0.5"], tmp_path / "no", **WHOLE)
    tail = {"tail": "bucket", "temperature": 1.0}
    assert train([f"{stock / 'cache'}:0.5", f"{stock / 'sparse'}:0.5"], tmp_path / "bucket", **tail, **WHOLE)


def test_the_teacher_on_its_own_labels_has_their_error(stock: Path) -> None:
    """At the cache's temperatures what the certificate says; at others next to nothing."""
    teacher, reader = load_causal_lm(str(stock / "teacher"), dtype=torch.float32), CacheReader(stock / "cache")
    declared = divergences(fidelity_of(reader, range(reader.manifest.shards.count)), 3)
    assert declared is not None
    stored = evaluate_on_cache(teacher, reader, None, 8)
    assert stored.kl_estimate == "exact labels"
    for found, limit in zip(stored.kl, declared, strict=True):
        assert 0 <= found.kl <= 1.5 * limit, found  # the certificate has the other direction, on some positions
    others = evaluate_on_cache(teacher, reader, None, 8, temperatures=(0.7, 1.2, 4.0))
    assert [found.temperature for found in others.kl] == [0.7, 1.2, 4.0]
    assert max(found.kl for found in others.kl) <= 3 * max(declared)
    teacher.get_input_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the model ran first"))
    with pytest.raises(LogitcaskError, match="--temperatures 4 is not stored"):
        evaluate_on_cache(teacher, CacheReader(stock / "sparse"), None, 8, temperatures=(4.0,))


def test_the_library(stock: Path) -> None:
    """kd_loss, kd_loss_from_logits, a loader with a worker process, and the mixture of a copy with its original."""
    cache = lc.open(stock / "cache")
    assert isinstance(cache[0].targets, ExactTargets)
    model = load_causal_lm(str(make_teacher(stock / "student", seed=3, width=16)), dtype=torch.float32)
    (batch,) = list(lc.loader(cache, 24, 2.5, num_workers=1))
    labels = batch["soft_labels"]
    stored = np.concatenate([vars(cache[i].targets)["tail_bias"] for i in range(len(cache))])
    assert sorted(labels.tail_bias.tolist()) == sorted(stored[:, 2].tolist())  # of T=2, the nearest to 2.5
    assert len({*stored.sum(0).tolist()}) == 3
    batch["soft_labels"] = replace(labels, tail_bias=labels.tail_bias + 0.5)  # of 8 bits it is too small to be seen
    for divergence in ("forward-kl", "reverse-kl"):
        fused = lc.kd_loss(model, batch, alpha=0.2, divergence=divergence)
        logits = model(input_ids=batch["input_ids"]).logits
        plain = lc.kd_loss_from_logits(logits, batch, alpha=0.2, divergence=divergence)
        torch.testing.assert_close(fused, plain)
        parts = lc.kd_loss(model, batch, alpha=0.2, divergence=divergence, per_position=True)
        torch.testing.assert_close(parts.mean(), plain)
    with pytest.raises(LogitcaskError, match=r"temperature is 1, but the batch's labels are at 2.5"):
        lc.kd_loss(model, batch, temperature=1.0)
    copy_cache(str(stock / "cache"), str(stock / "copy.zip"), None)
    mixed = lc.mix([cache, lc.open(stock / "copy.zip")], [0.5, 0.5])
    (again,) = list(lc.loader(mixed, 48, 2.5, packed=True))
    torch.testing.assert_close(lc.kd_loss(model, again, alpha=0.2), lc.kd_loss(model, batch, alpha=0.2))
    assert float(again["soft_labels"].tail_bias.abs().max()) > 0.0
    with pytest.raises(LogitcaskError, match="temperature must be above 0"):
        cache.collator(0.0)
    with pytest.raises(CacheMismatchError, match="sparse: has no exact labels"):
        lc.open(stock / "sparse").collator(tail="exact")


def test_a_page_of_labels_has_the_whole_divergence_and_an_export_the_heads(stock: Path, tmp_path: Path) -> None:
    teacher, reader = load_causal_lm(str(stock / "teacher"), dtype=torch.float32), CacheReader(stock / "cache")
    head, label = StoredHead(((reader.path, reader.opened),)), reader.manifest.label
    rows = student_rows(teacher, read_head(teacher), reader.example(3), label, head)
    assert float(rows.kl.max()) < 0.01
    other = load_causal_lm(str(make_teacher(tmp_path / "other", seed=4)), dtype=torch.float32)
    log_p, _ = dense(stock / "teacher", stock / "cache", [3])
    log_q, _ = dense(tmp_path / "other", stock / "cache", [3])
    found = student_rows(other, read_head(other), reader.example(3), label, head).kl
    np.testing.assert_allclose(found, (log_p.exp() * (log_p - log_q)).sum(1), rtol=0.02)
    assert export_labels(str(stock / "cache"), tmp_path / "heads.jsonl", "topk-jsonl") == 24
