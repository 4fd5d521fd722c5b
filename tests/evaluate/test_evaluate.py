"""logitcask evaluate against the dense float64 reference, computed with the models themselves."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cli import main
from logitcask.pipeline.evaluate import evaluate as evaluating
from logitcask.pipeline.evaluate import on_cache
from logitcask.pipeline.evaluate.on_cache import ClusterSums, calibration_bins, calibration_error
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.runs.evaluation import OnCache
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from tests.support.mistakes import said
from tests.support.tiny import FloatArray64, dense_log_probs, make_cache, make_teacher


def dense_logits(model: Path, cache: Path) -> tuple[list[FloatArray64], list[NDArray[np.int64]]]:
    """Return float64 logits and next tokens at the target positions of each example, with one forward pass each."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    reader, logits, gold = CacheReader(cache), [], []
    for index in range(len(reader)):
        example = reader.example(index)
        at = np.flatnonzero(example.target_mask)
        with torch.no_grad():
            logits.append(loaded(torch.from_numpy(example.input_ids)[None]).logits[0].numpy()[at])
        gold.append(example.input_ids[at + 1])
    return logits, gold


class Dense:
    """The figures of a student on a cache, computed from both models' full distributions."""

    def __init__(self, student: Path, teacher: Path, cache: Path) -> None:
        logits, gold = dense_logits(student, cache)
        self.q, self.gold = np.concatenate(logits), np.concatenate(gold).astype(int)
        self.p = np.concatenate(dense_logits(teacher, cache)[0])[:, : CacheReader(cache).manifest.label.vocab_size]
        self.counts = [len(part) for part in gold]

    @property
    def hard(self) -> FloatArray64:
        losses: FloatArray64 = -dense_log_probs(self.q)[np.arange(len(self.gold)), self.gold]
        return losses

    def kl(self, t: float, log_p: FloatArray64 | None = None) -> FloatArray64:
        log_p = dense_log_probs(self.p, t) if log_p is None else log_p
        divergences: FloatArray64 = (np.exp(log_p) * (log_p - dense_log_probs(self.q, t)[:, : log_p.shape[1]])).sum(1)
        return divergences

    def calibration(self, logits: FloatArray64) -> float:
        confidence, right = np.exp(dense_log_probs(logits)).max(1), logits.argmax(1) == self.gold
        bins, error = np.ceil(confidence * 15), 0.0
        for number in range(1, 16):
            inside = bins == number
            if inside.any():
                error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        return error

    def standard_error(self, values: FloatArray64) -> float:
        ends = np.cumsum(self.counts)
        residual = np.array([part.sum() for part in np.split(values - values.mean(), ends[:-1])])
        return float(np.sqrt((residual**2).sum() * len(ends) / (len(ends) - 1)) / len(values))


def settings(student: Path, cache: Path, **changes: object) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"model": str(student), "cache": str(cache), "device": "cpu", **changes})


def evaluate(settings: EvaluateSettings) -> OnCache:
    """Return the figures on a cache."""
    evaluation = evaluating.evaluate(settings)
    assert (evaluation.humaneval, evaluation.tasks) == (None, [])
    assert evaluation.on_cache is not None
    return evaluation.on_cache


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of another width and seed, and a cache of labels with draws."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_teacher(folder / "student", seed=1, width=48)
    make_cache(folder, make_teacher(folder / "teacher"))
    return folder


@pytest.fixture(scope="module")
def dense(place: Path) -> Dense:
    return Dense(place / "student", place / "teacher", place / "cache")


@pytest.fixture(scope="module")
def figures(place: Path) -> OnCache:
    return evaluate(settings(place / "student", place / "cache"))


def test_losses_and_perplexities_match_the_models(figures: OnCache, dense: Dense) -> None:
    assert (figures.examples, figures.positions) == (len(dense.counts), len(dense.gold))
    assert figures.hard_loss == pytest.approx(dense.hard.mean(), rel=1e-5)
    assert figures.perplexity == pytest.approx(np.exp(dense.hard.mean()), rel=1e-4)
    assert figures.hard_loss_standard_error == pytest.approx(dense.standard_error(dense.hard), rel=1e-4)
    teacher_losses = -dense_log_probs(dense.p)[np.arange(len(dense.gold)), dense.gold]
    assert figures.teacher_perplexity == pytest.approx(np.exp(teacher_losses.mean()), rel=0.01)


def test_agreement_and_calibration_match_the_models(figures: OnCache, dense: Dense) -> None:
    assert figures.top1_agreement == pytest.approx(np.mean(dense.q.argmax(1) == dense.p.argmax(1)))
    assert figures.calibration_error == pytest.approx(dense.calibration(dense.q), abs=1e-6)
    assert figures.teacher_calibration_error == pytest.approx(dense.calibration(dense.p), abs=0.01)


def test_the_teacher_is_right_if_its_first_token_came_next(place: Path) -> None:
    """The labels' first token is set to the next one at half of the positions; the student is uniform."""
    reader = CacheReader(place / "cache")
    example = reader.example(0)
    targets, gold = example.targets, example.input_ids[np.flatnonzero(example.target_mask) + 1]
    right = np.arange(len(gold)) < len(gold) // 2
    ids = targets.head_ids.copy()
    ids[:, 0] = np.where(right, gold, 299 - gold)
    totals = on_cache._Totals(reader.manifest.label, {}, reader.manifest.label.temperatures)
    uniform = LMHead(torch.zeros(300, 4), None, 1.0, None)
    changed = replace(example, targets=replace(targets, head_ids=ids))
    totals.add([changed], torch.zeros(len(gold), 4), uniform, torch.from_numpy(gold))
    confidence = np.exp(targets.head_logprobs[:, 0] - targets.log_partition[:, 0]).astype(float)
    want = calibration_error(calibration_bins(confidence, right), len(gold))
    assert totals.on_cache("c").teacher_calibration_error == pytest.approx(want)


def test_with_the_whole_vocabulary_as_head_the_kl_is_exact(place: Path, dense: Dense) -> None:
    vocabulary = CacheReader(place / "cache").manifest.label.vocab_size
    cache = make_cache(place, place / "teacher", output=place / "whole", head_size=vocabulary, tail_draws=0)
    got, reader = evaluate(settings(place / "student", cache)), CacheReader(cache)
    assert got.kl_estimate == "exact"
    whole = Dense(place / "student", place / "teacher", cache)
    targets = [reader.example(i).targets for i in range(len(reader))]
    for j, each in enumerate(got.kl):
        stored = np.full_like(whole.p, -np.inf)
        for target, part in zip(targets, np.split(stored, np.cumsum(whole.counts)[:-1]), strict=True):
            log_p = target.head_logprobs.astype(float) / each.temperature - target.log_partition[:, j, None]
            np.put_along_axis(part, target.head_ids, log_p, axis=1)
        values = whole.kl(each.temperature, stored)
        assert each.kl == pytest.approx(values.mean(), rel=1e-5)
        assert each.standard_error == pytest.approx(whole.standard_error(values), rel=1e-4)
        assert each.kl == pytest.approx(whole.kl(each.temperature).mean(), rel=5e-3)  # the codes' rounding


def test_sampled_labels_give_the_kl_without_bias(place: Path, figures: OnCache, dense: Dense) -> None:
    """The mean over ten caches with different draws is within four standard errors plus the codes' rounding."""
    caches = [place / "cache"] + [
        make_cache(place, place / "teacher", output=place / f"seed {seed}", seed=seed) for seed in range(1, 10)
    ]
    got = [evaluate(settings(place / "student", cache)) for cache in caches]
    assert {each.kl_estimate for each in got} == {"unbiased"}
    for j, each in enumerate(figures.kl):
        values = np.array([one.kl[j].kl for one in got])
        exact = dense.kl(each.temperature).mean()
        assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / np.sqrt(len(values)) + 5e-3 * exact
        assert each.standard_error is not None
        assert dense.standard_error(dense.kl(each.temperature)) < 1.5 * each.standard_error


def test_slices_and_batches_do_not_matter(place: Path, figures: OnCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cache, "SLICE_LOGITS", 7 * 300)
    again = evaluate(settings(place / "student", place / "cache", batch_size=5))
    for name, value in figures.model_dump(exclude={"kl"}).items():
        assert getattr(again, name) == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    for one, other in zip(again.kl, figures.kl, strict=True):
        assert one.model_dump() == pytest.approx(other.model_dump(), rel=1e-5)


def test_a_limit_takes_the_first_examples(place: Path, dense: Dense) -> None:
    got = evaluate(settings(place / "student", place / "cache", limit=3, batch_size=2))
    count = sum(dense.counts[:3])
    assert (got.examples, got.positions) == (3, count)
    assert got.hard_loss == pytest.approx(dense.hard[:count].mean(), rel=1e-5)
    one = evaluate(settings(place / "student", place / "cache", limit=1))
    assert one.hard_loss_standard_error is None
    assert one.kl[0].standard_error is None


def test_the_teacher_itself_is_as_close_as_its_labels(place: Path) -> None:
    got = evaluate(settings(place / "teacher", place / "cache"))
    assert got.top1_agreement == 1.0
    assert all(abs(each.kl) < 0.02 for each in got.kl)


def test_without_draws_the_kl_is_a_lower_bound(place: Path) -> None:
    cache = make_cache(place, place / "teacher", output=place / "top-k", tail_draws=0)
    got, whole = evaluate(settings(place / "student", cache)), Dense(place / "student", place / "teacher", cache)
    assert got.kl_estimate == "lower bound"
    assert all(0 < each.kl < whole.kl(each.temperature).mean() for each in got.kl)


def test_without_a_head_there_is_no_agreement(place: Path) -> None:
    cache = make_cache(place, place / "teacher", output=place / "headless", head_size=0)
    got = evaluate(settings(place / "student", cache))
    assert (got.top1_agreement, got.teacher_calibration_error) == (None, None)


def test_standard_errors_match_a_bootstrap() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 30, 400).astype(float)
    values = counts * (2 + random.normal(0, 0.5, 400)) + random.normal(0, 1, 400)
    sums = ClusterSums(2)
    for part in np.split(np.stack([counts, values], axis=1), 8):
        sums.add(part)
    mean, error = sums.mean(1)
    again = [values[i].sum() / counts[i].sum() for i in random.integers(0, 400, (2000, 400))]
    assert mean == pytest.approx(values.sum() / counts.sum())
    assert error == pytest.approx(np.std(again), rel=0.1)


def test_calibration_of_a_known_case() -> None:
    """Two bins: confidences 0.95, 0.95 and 1.0 with two of three right; confidence 0.35, wrong."""
    bins = calibration_bins(np.array([0.95, 0.95, 0.35, 1.0]), np.array([True, False, False, True]))
    assert calibration_error(bins, 4) == pytest.approx((2.9 - 2 + 0.35) / 4)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["logitcask", "evaluate", *map(str, words), "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_prints_and_writes(
    place: Path, tmp_path: Path, figures: OnCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", place / "student", "--cache", place / "cache")
    (tmp_path / "link.json").symlink_to("evaluation.json")
    assert run(monkeypatch, *words, "--json", "--output", tmp_path / "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "evaluation.json").read_text())
    assert printed["on_cache"] == figures.model_dump()
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    for word in ("perplexity", "KL to the teacher at T=1.5, nats, unbiased", "±", "agreement", "calibration"):
        assert word in out


def test_what_is_found_is_kept_if_a_later_part_fails(
    place: Path, tmp_path: Path, figures: OnCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LogitcaskError("the second part failed")

    words = ("--model", place / "student", "--cache", place / "cache", "--output", tmp_path / "evaluation.json")
    with monkeypatch.context() as patched:
        patched.setattr(evaluating, "humaneval", fail)
        assert run(patched, *words, "--humaneval", "--allow-code-execution") == 2
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["on_cache"], found["humaneval"]) == (figures.model_dump(), None)


def test_a_pipe_stays_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a device, such as /dev/stdout: no file takes its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    words = ("--model", place / "student", "--cache", place / "cache", "--limit", 1)
    assert run(monkeypatch, *words, "--output", pipe) == 0
    assert pipe.is_fifo()
    assert json.loads(os.read(reader, 1 << 16))["on_cache"]["examples"] == 1
    os.close(reader)


def test_what_cannot_be_written_is_printed(
    place: Path, tmp_path: Path, figures: OnCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", place / "student", "--cache", place / "cache", "--output", tmp_path / "out/evaluation.json")
    (tmp_path / "out").mkdir()

    def unmounted(*given: Any) -> OnCache:
        (tmp_path / "out").rmdir()
        return figures

    monkeypatch.setattr(evaluating, "evaluate_on_cache", unmounted)
    assert run(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert figures.model_dump_json() in err
    assert "cannot be written: No such file or directory" in said(err)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "{0}/chat"}, "was made with another tokenizer than"),
        ({"model": "{0}/none"}, "no tokenizer could be loaded"),
        ({"cache": "{0}/none"}, "no such cache"),
        ({"model": "{0}/short"}, "max_position_embeddings is 16, the longest example has"),
        ({"model": "{0}/broken"}, "already has non-finite parameters: 1"),
        ({"output": "{0}/none/x.json"}, "there is no folder"),
        ({"output": "{0}"}, "cannot be written: choose another file"),
        ({"limit": "0"}, "--limit: must be greater than or equal to 1"),
    ],
)
def test_a_mismatch_is_a_one_line_error(
    changes: dict[str, str],
    message: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_teacher(tmp_path / "chat", chat=True)
    make_teacher(tmp_path / "short", max_length=16)
    model: Any = AutoModelForCausalLM.from_pretrained(make_teacher(tmp_path / "broken"))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    given = {"model": place / "student", "cache": place / "cache"} | {
        name: value.format(tmp_path) for name, value in changes.items()
    }
    assert run(monkeypatch, *(word for name, value in given.items() for word in (f"--{name}", value))) == 2
    err = capsys.readouterr().err
    assert message in said(err)
