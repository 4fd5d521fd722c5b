"""The soft loss on a share of the positions: against dense float64, the same for any batches, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Batch, Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.models.losses import LossSettings, position_losses
from logitcask.pipeline.train.loss import make_loss_forward
from logitcask.pipeline.train.selection import Selection
from tests.support.distilled import make_student, mixed_lengths
from tests.support.runs import losses, metrics, train, train_settings

SHARE = 0.3


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_lengths(tmp_path_factory.mktemp("mixed"))


def make_batch(cache: Path, *, packed: bool, tail: str) -> Batch:
    source = CacheExamples(str(cache), with_targets=True)
    temperatures = tuple(CacheReader(cache).manifest.label.temperatures)
    batch = Collator(0, temperatures, 2.0, tail, packed)([source[i] for i in (0, 9, 17, 3, 21, 1)])
    assert ("position_ids" in batch) == packed
    batch["soft_labels"] = batch["soft_labels"].map(lambda part: part.double() if part.is_floating_point() else part)
    return batch


def lengths(cache: Path) -> list[int]:
    source = CacheExamples(str(cache), with_targets=True)
    return [int(source[i].encoded.target_mask.sum()) for i in (0, 9, 17, 3, 21, 1)]


def dense_loss(logits: Tensor, batch: Batch, how: LossSettings, by: str, counts: list[int]) -> tuple[Tensor, int]:
    """Return the step's mean loss from full logits (N, V), and the number of positions selected."""
    labels, log_q = batch["soft_labels"], torch.log_softmax(logits.detach(), 1)
    entropy = -(log_q.exp() * log_q).sum(1)
    if by == "teacher-entropy":
        entropy = -(labels.weights * labels.log_probs).sum(1)
        if how.tail == "bucket":
            entropy = entropy - labels.log_rest.exp() * labels.log_rest
    chosen, first = list[int](), 0
    for count in counts:
        own = sorted(range(first, first + count), key=lambda i: (-float(entropy[i]), i))
        chosen += own[: -(-int(count * SHARE * 10) // 10)]
        first += count
    assert first == len(logits)
    hard = position_losses(logits, batch["gold"], None, replace(how, alpha=1.0))[0].mean()
    soft = position_losses(logits, batch["gold"], labels, how)[2][chosen].mean()
    return how.alpha * hard + (1 - how.alpha) * soft, len(chosen)


@pytest.mark.parametrize("by", ["entropy", "teacher-entropy"])
@pytest.mark.parametrize(
    ("packed", "alpha", "tail", "divergence"),
    [(True, 0.0, "sampled", "forward-kl"), (False, 0.3, "sampled", "forward-kl"), (True, 0.3, "bucket", "reverse-kl")],
)
def test_value_and_gradient_are_those_of_the_dense_loss(
    mixed: Path, by: str, packed: bool, alpha: float, tail: str, divergence: str
) -> None:
    batch, how = make_batch(mixed, packed=packed, tail=tail), LossSettings(alpha, 2.0, tail, divergence)
    model = make_student().double().train()
    given = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    logits = model(**given, use_cache=False).logits.flatten(0, 1)[batch["target_index"]]
    expected, selected = dense_loss(logits, batch, how, by, lengths(mixed))
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    selection, count = Selection(by, SHARE), len(batch["gold"])
    assert int(selection.counts(batch)[1].sum()) == selected < count / 2
    make_loss_forward(model, how, selection=selection)
    batch["soft_scale"] = count / selected
    total = model(**batch).total / count
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0.0)
    for found, gradient in zip(torch.autograd.grad(total, parameters), wanted, strict=True):
        assert (found - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12


def test_batches_and_accumulation_do_not_change_which(cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Nor do ranks, which take examples as accumulation does. Held-out examples are evaluated at all positions."""
    chosen = {**options, "max_steps": 3, "select": "entropy:0.3"}
    one = train(cache, tmp_path / "one", **{**chosen, "batch_size": 8})
    four = train(cache, tmp_path / "four", **{**chosen, "batch_size": 2, "gradient_accumulation_steps": 4})
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert losses(four, "soft_loss") == pytest.approx(losses(one, "soft_loss"), rel=1e-5)
    whole = train(cache, tmp_path / "whole", **{**chosen, "batch_size": 8, "select": "entropy:1"})
    plain = train(cache, tmp_path / "plain", **{**chosen, "batch_size": 8, "select": None})
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(one)[0] != pytest.approx(losses(plain)[0], rel=1e-3)
    assert metrics(one)["before"] == metrics(plain)["before"]
    shutil.copytree(one / "checkpoint-2", tmp_path / "resumed/checkpoint-2")
    resumed = train(cache, tmp_path / "resumed", **{**chosen, "batch_size": 8}, resume_from_checkpoint="latest")
    assert losses(resumed) == losses(one)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"select": "entropy"}, "--select must be entropy:SHARE or teacher-entropy:SHARE .*, got 'entropy'"),
        ({"select": "entropy:0"}, "with a share above 0 and at most 1"),
        ({"select": "loss:0.5"}, "--select must be entropy:SHARE"),
        ({"select": "entropy:1.5"}, "--select must be entropy:SHARE"),
        ({"select": "entropy:0.5", "distillation_type": "output"}, "--select applies to a soft loss"),
        ({"select": "entropy:0.5", "cache": None, "train_data": "d", "teacher_model": "m"}, "--select applies to a ca"),
        ({"select": "entropy:0.5", "cache": "c:0.5", "train_data": "d:0.5"}, "or give --cache without --train-data"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        train_settings(changes.pop("cache", "c"), tmp_path / "run", **changes)
