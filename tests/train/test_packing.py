"""Packed examples have the loss and gradient of unpacked ones; students that cannot pack get batches of one length."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Collator, TrainingExample, pack_first_fit_decreasing
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import GROUP, BatchSampler
from logitcask.pipeline.models.head import keeps_apart
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.train.loss import make_loss_forward
from tests.support.runs import history, train, write_config
from tests.support.tiny import make_cache
from tests.train.test_train import ARCHITECTURES

APART = {"opt": False}  # its positions come from a padding mask
LOSS = LossSettings(alpha=0.5, temperature=2.0, tail="sampled", divergence="forward-kl")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("packing"))


def shortened(example: TrainingExample, targets: int) -> TrainingExample:
    """Cut an example off after ``targets`` of its target positions; 0 leaves it whole."""
    if not targets:
        return example
    assert example.targets is not None
    last = int(np.flatnonzero(example.encoded.target_mask)[targets - 1])
    ids, mask = example.encoded.input_ids[: last + 2], example.encoded.target_mask[: last + 2].copy()
    mask[-1] = False
    return TrainingExample(Encoded(ids, mask), example.targets[slice(0, targets)])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_examples_do_not_overlap(lengths: list[int]) -> None:
    rows, starts = pack_first_fit_decreasing(lengths, max(lengths))
    taken = np.zeros((max(rows) + 1, max(lengths)), dtype=int)
    for length, row, start in zip(lengths, rows, starts, strict=True):
        assert start + length <= max(lengths)
        taken[row, start : start + length] += 1
    assert taken.max() == 1
    assert taken.any(1).all()
    filled = sorted(taken.sum(1))
    assert len(filled) == 1 or filled[0] + filled[1] > max(lengths)  # no two rows could have been merged


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_examples_have_the_loss_and_gradient_of_unpacked_ones(name: str, cache: Path, tmp_path: Path) -> None:
    reader = CacheReader(cache)
    torch.manual_seed(0)
    model = student_from_config(
        write_config(tmp_path / "student.json", ARCHITECTURES[name]), reader.manifest.label.vocab_size
    )
    model.eval()
    apart = keeps_apart(model)
    assert apart == APART.get(name, True)
    alone = Collator(0, tuple(reader.manifest.label.temperatures), 2.0, "sampled")
    source = CacheExamples(str(cache), with_targets=True)
    examples = [shortened(source[i], i % 3) for i in range(12)]
    make_loss_forward(model, LOSS)
    results = []
    for collator in (alone, replace(alone, packed=True)):
        batch = collator(examples)
        model.zero_grad()
        sums = model(**batch)
        torch.autograd.backward(sums.total)
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        results.append((batch, sums.total.detach(), gradient))
    (rows, loss, gradient), (packed_rows, packed_loss, packed_gradient) = results
    assert len(packed_rows["input_ids"]) < len(rows["input_ids"])
    assert packed_rows["slots"][0] == rows["slots"][0] == sum(len(e.encoded.input_ids) for e in examples)
    same = abs(float(packed_loss / loss) - 1) < 1e-5
    assert same == apart
    if apart:
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_the_log_shows_the_share_of_padding(cache: Path, tmp_path: Path) -> None:
    run = train(cache, tmp_path / "run", batch_size=24, max_steps=1, eval_fraction=0.0)
    source = CacheExamples(str(cache), with_targets=False)
    lengths = [len(source[i].encoded.input_ids) for i in range(24)]
    room = (max(pack_first_fit_decreasing(lengths, max(lengths))[0]) + 1) * max(lengths)
    (padding,) = (line["padding"] for line in history(run) if "padding" in line)
    assert padding == pytest.approx(1 - sum(lengths) / room)
    assert padding > 0


def test_batches_of_one_length() -> None:
    random = np.random.default_rng(0)
    starts, lengths = np.array([0, 700, 1003]), random.integers(1, 100, 1003)
    nobody = np.zeros(0, dtype=np.int64)
    plain = BatchSampler(starts, nobody, 8, 0)
    grouped = BatchSampler(starts, nobody, 8, 0, lengths=lengths)
    halves = [BatchSampler(starts, nobody, 4, 0, rank, 2, lengths=lengths) for rank in range(2)]
    accumulated = BatchSampler(starts, nobody, 4, 0, lengths=lengths, accumulation=2)

    def padding(batches: list[list[int]]) -> float:
        room = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
        return 1 - int(lengths.sum()) / room

    for epoch in range(2):
        for sampler in (plain, grouped, *halves, accumulated):
            sampler.set_epoch(epoch)
        batches = list(grouped)
        assert sorted(index for batch in batches for index in batch) == list(range(1003))
        assert [len(batch) for batch in batches] == [8] * 125 + [3]
        assert padding(batches) < 0.1
        assert padding(list(plain)) > 0.4
        assert [one + other for one, other in zip(*halves, strict=True)] == batches
        small = [*accumulated, []]
        assert [small[i] + small[i + 1] for i in range(0, len(small) - 1, 2)] == batches
        means = [float(lengths[batch].mean()) for batch in batches[:GROUP]]
        assert means != sorted(means)  # the steps themselves are shuffled


def test_a_student_that_cannot_pack_trains_on_batches_of_one_length(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(cache, tmp_path / "run", student_config=write_config(tmp_path / "opt.json", ARCHITECTURES["opt"]))
    assert "held out, one example per row" in capsys.readouterr().err
