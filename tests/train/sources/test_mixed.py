"""Several caches and text without labels in one run: shares, held-out examples, the loss, resuming, bad use."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcask as lc
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.runs.run_folder import source_of
from logitcask.pipeline.settings.base import split_weight
from logitcask.pipeline.train.loss import make_loss_forward
from logitcask.pipeline.train.sources.open import open_source
from logitcask.pipeline.train.sources.source import Source
from tests.support.distilled import assert_close, dense_losses, gradients, make_student
from tests.support.runs import STUDENT, losses, metrics, train, train_settings, weights, write_config
from tests.support.tiny import RECORDS, make_cache, make_teacher, write_jsonl

TEXT: list[dict[str, object]] = [{"text": f"Replay {n}: " + "old words " * (1 + n % 3)} for n in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches ``a`` and ``b`` of one teacher with other presets, ``far`` at another temperature, and a text."""
    folder = tmp_path_factory.mktemp("mixed")
    teacher = make_teacher(folder / "teacher")
    longer = [{**record, "response": f"{record['response']} Or {n}."} for n, record in enumerate(RECORDS[:10])]
    data = str(write_jsonl(folder / "b.jsonl", longer))
    make_cache(folder, teacher, output=folder / "a")
    make_cache(folder, teacher, output=folder / "b", train_data=data, head_size=2, temperatures="1,2")
    make_cache(folder, teacher, output=folder / "far", train_data=data, temperatures="4")
    write_jsonl(folder / "text.jsonl", TEXT)
    return folder


def opened(place: Path, tmp_path: Path, **changes: object) -> Source:
    text, both = f"{place}/text.jsonl:0.2", [f"{place}/a:0.5", f"{place}/b:0.3"]
    settings = train_settings(changes.pop("cache", both), tmp_path / "run", **{"train_data": text, **changes})  # type: ignore[arg-type]
    return open_source(settings, Path(tempfile.mkdtemp(dir=tmp_path)))


def batches_of(source: Source, held: Sequence[int], rank: int = 0, ranks: int = 1) -> BatchSampler:
    left_out = np.array(held, dtype=np.int64)
    mixture = source.mixture(left_out)
    return source.sampler(left_out, mixture, 4 // ranks, 7, rank=rank, ranks=ranks, accumulation=1, packed=True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", ("a", None)), ("a:0.7", ("a", 0.7)), ("a:-2e-1", ("a", -0.2)), ("s3://b/a:.7", ("s3://b/a", 0.7)),
        ("s3://bucket/a", ("s3://bucket/a", None)), ("C:\\cache", ("C:\\cache", None)), ("C:/x:1", ("C:/x", 1.0)),
        ("hf://datasets/o/n@v1", ("hf://datasets/o/n@v1", None)), ("a:b", ("a:b", None)), (":0.5", (":0.5", None)),
        ("here:0.5", ("here:0.5", None)), ("here:0.5:0.3", ("here:0.5", 0.3)),
    ],
)  # fmt: skip
def test_a_weight_is_the_number_after_the_last_colon(
    text: str, wanted: tuple[str, float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here:0.5").mkdir()
    assert split_weight(text) == wanted


def test_shares_hold_and_examples_of_each_part_are_held_out(place: Path, tmp_path: Path) -> None:
    source = opened(place, tmp_path)
    held = source.held_out(0.2, 0)
    ends = np.cumsum([part.amount.examples for part in source.parts])
    assert np.bincount(np.searchsorted(ends, held, side="right")).tolist() == [5, 2, 2]
    sampler = batches_of(source, held.tolist())
    for epoch in (0, 1, 2):
        order = sampler.order(epoch)
        assert not set(order.tolist()) & set(held.tolist())
        part = np.searchsorted(ends, order, side="right")
        positions = source.positions()[order]
        shares = np.bincount(part, positions) / positions.sum()
        assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
    ranked = [[*a, *b] for a, b in zip(*(batches_of(source, held.tolist(), r, 2) for r in (0, 1)), strict=True)]
    assert ranked == list(batches_of(source, held.tolist()))


def test_caches_alone_are_in_the_order_of_the_library(place: Path, tmp_path: Path) -> None:
    source = opened(place, tmp_path, cache=[f"{place}/a:0.6", f"{place}/b:0.4"], train_data=None)
    library = lc.mix([lc.open(place / "a"), lc.open(place / "b")], [0.6, 0.4]).dataset()
    assert list(batches_of(source, [])) == list(library.batches(4, 7))
    assert source.collator(2.0, packed=False).temperatures == (1.0, 2.0)


def test_text_without_labels_has_the_hard_loss_alone(place: Path, tmp_path: Path) -> None:
    source, model, alpha = opened(place, tmp_path), make_student(), 0.3
    batch = source.collator(2.0, packed=False)([source.examples[i] for i in (40, 3, 30, 25, 41)])  # text, a, b, b, text
    known = batch["labelled"]
    assert 0 < int(known.sum()) == len(batch["soft_labels"].log_rest) < len(known)
    wide = make_student().double()
    logits = wide(input_ids=batch["input_ids"]).logits
    parts = {**batch, "target_index": batch["target_index"][known], "gold": batch["gold"][known]}
    hard = -torch.log_softmax(logits.flatten(0, 1)[batch["target_index"]], 1).gather(1, batch["gold"][:, None])[:, 0]
    expected = dense_losses(logits, parts, alpha).sum() + hard[~known].sum()
    torch.autograd.backward(expected)
    make_loss_forward(model, LossSettings(alpha, 2.0, "sampled", "forward-kl"))
    sums = model(**batch)
    torch.autograd.backward(sums.total)
    assert float(sums.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(sums.hard) == pytest.approx(float(hard.detach().sum()), rel=1e-5)
    assert_close(gradients(model), gradients(wide))


def test_a_run_resumes_exactly_and_only_on_the_same_mixture(place: Path, tmp_path: Path) -> None:
    cache = [f"{place}/a:0.5", f"{place}/b:0.3"]
    how: dict[str, Any] = {"train_data": f"{place}/text.jsonl:0.2", "max_steps": 6, "save_steps": 3, "batch_size": 4}
    how["student_config"] = write_config(tmp_path / "student.json", STUDENT)
    straight = train(cache, tmp_path / "straight", **how)
    before, after = metrics(straight)["before"], metrics(straight)["after"]
    assert after["eval_total_loss"] < before["eval_total_loss"]
    resumed = tmp_path / "straight/checkpoint-3"
    again = train(cache, tmp_path / "again", **how, resume_from_checkpoint=str(resumed))
    assert losses(again) == losses(straight)
    for name, tensor in weights(straight / "final").items():
        assert torch.equal(tensor, weights(again / "final")[name]), name
    assert str(source_of(straight / "final")).count(" + ") == 2
    for other in ([f"{place}/a:0.3", f"{place}/b:0.5"], [f"{place}/a:0.5", f"{place}/a:0.3"]):
        with pytest.raises(LogitcaskError, match="checkpoint of another run: source"):
            train(other, tmp_path / "other", **how, resume_from_checkpoint=str(resumed))


def test_a_non_finite_label_is_named_by_its_own_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Example 4 of ``b`` is number 28 of the mixture; it is trained on, or held out."""
    plain = CacheReader.example

    def damaged(self: CacheReader, index: int) -> Any:
        example = plain(self, index)
        if Path(self.path).name == "b" and index == 4:
            example.targets.head_logprobs[0, 0] = np.nan
        return example

    monkeypatch.setattr(CacheReader, "example", damaged)
    a, b = f"{place}/a", f"{place}/b"
    how = {"batch_size": 8, "max_steps": 6, "student_config": write_config(tmp_path / "student.json", STUDENT)}
    for fraction, where in (
        (0.0, rf"8 examples of the cache or data are [\d, ]+ of {a} and ([\d, ]*\b)4(, \d+)* of {b}; "),
        (0.9, rf"held-out examples, first at example 4 of {b} of the cache or data; "),
    ):
        with pytest.raises(LogitcaskError, match=where) as caught:
            train([f"{a}:0.5", f"{b}:0.5"], tmp_path / "run", **how, eval_fraction=fraction)
        assert f"likely cause: the label of example 4 of {b} is non-finite" in str(caught.value)
        shutil.rmtree(tmp_path / "run")
    assert CacheExamples(a, with_targets=True, chosen=np.array([3, 5, 20])).describe([2, 0]) == "20, 3"


def test_what_does_not_fit_together_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    make_cache(tmp_path, make_teacher(tmp_path / "teacher", vocab_size=290), output=tmp_path / "other")
    a, b, other, far = f"{place}/a", f"{place}/b", f"{tmp_path}/other", f"{place}/far"
    cases: list[tuple[dict[str, object], str]] = [
        ({"cache": [f"{a}:0.7", f"{b}:0.2"]}, "--cache: weights must be above 0 and sum to 1, got 0.7, 0.2"),
        ({"cache": [f"{a}:1.2", f"{b}:-0.2"]}, "above 0 and sum to 1, got 1.2, -0.2"),
        ({"cache": f"{a}:0.7", "train_data": f"{place}/text.jsonl:0.2"}, "--cache and --train-data: weights must be"),
        ({"cache": [f"{a}:0.7", b]}, f"{b}: several caches, or text beside one, need a weight each"),
        ({"cache": [f"{a}:0.7", f"{other}:0.3"]}, "another tokenizer"),
        ({"cache": [f"{a}:0.7", f"{far}:0.3"]}, "no temperature in common: they store 1, 1.5, 2; 4"),
        ({"cache": [f"{a}:0.7", f"{b}:0.3"], "temperature": 1.5}, "not stored in every cache: all hold 1, 2"),
        ({"cache": [f"{a}:0.7", f"{b}:0.3"], "student_model": f"{tmp_path}/teacher"}, "another tokenizer"),
    ]
    for changes, message in cases:
        with pytest.raises((LogitcaskError, ValueError)) as caught:
            opened(place, tmp_path, **{"train_data": None, **changes})
        assert message in str(caught.value), message
