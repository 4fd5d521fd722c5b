"""Which examples the page of labels shows, and what it holds of them."""

import base64
import gzip
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import soft_labels
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.models.head import read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.pages.choose import choose
from logitcask.pipeline.pages.contents import DRAWS_SHOWN, STEPS, pack, shown_draws, student_rows, token_texts
from tests.support.tiny import make_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``cache`` and the ``teacher`` that labelled it."""
    made = tmp_path_factory.mktemp("browse")
    make_cache(made)
    return made


@pytest.fixture(scope="module")
def reader(folder: Path) -> CacheReader:
    return CacheReader(folder / "cache")


def test_the_worst_examples_are_those_whose_text_surprised_the_teacher_most(reader: CacheReader) -> None:
    means = [-float(reader.example(i).targets.gold_logprobs.astype(np.float64).mean()) for i in range(len(reader))]
    order = np.argsort(means, kind="stable")
    assert list(choose(reader, ("worst:3",), 0)) == order[::-1][:3].tolist()
    assert choose(reader, ("best:2", "1:3"), 0) == {int(order[0]): "best", int(order[1]): "best"} | {
        i: "best" if i in order[:2] else "chosen" for i in (1, 2)
    }
    some = choose(reader, ("random:4",), 7)
    assert len(some) == 4
    assert some == choose(reader, ("random:4",), 7) != choose(reader, ("random:4",), 8)
    assert len(choose(reader, ("random:1000",), 0)) == len(reader)
    for part in (f"{len(reader)}", f"3:{len(reader) + 1}", "3:3"):
        with pytest.raises(LogitcaskError, match=rf"--examples {part}: .*0 to {len(reader) - 1}"):
            choose(reader, (part,), 0)


def test_what_is_packed_are_the_labels(reader: CacheReader) -> None:
    example, label = reader.example(2), reader.manifest.label
    targets = example.targets
    entry, ids = pack(example, label, None)
    data = gzip.decompress(base64.b64decode(entry["data"]))
    n, k, d = len(targets), label.head_size, min(DRAWS_SHOWN, label.tail_draws)
    wide = np.frombuffer(data, "<i4", len(example.input_ids) + n * k + n * d)
    assert np.array_equal(wide[: len(example.input_ids)], example.input_ids)
    assert np.array_equal(wide[len(example.input_ids) :][: n * k].reshape(n, k), targets.head_ids)
    logprobs = np.frombuffer(data, "<i2", n * k, wide.nbytes).reshape(n, k) / STEPS
    np.testing.assert_allclose(logprobs, targets.head_logprobs, atol=0.5 / STEPS)
    assert data.endswith(example.target_mask.astype(np.uint8).tobytes())
    assert set(example.input_ids) | set(targets.head_ids.ravel()) <= ids
    assert entry["surprise"] == pytest.approx(-targets.gold_logprobs.mean(), abs=1e-3)


def test_the_draws_shown_are_the_most_probable(reader: CacheReader) -> None:
    targets = reader.example(1).targets
    ids, logprobs, counts = shown_draws(targets)
    for row in range(len(targets)):
        drawn = targets.tail_counts[row] > 0
        wanted = np.sort(targets.tail_logprobs[row][drawn].astype(np.float32))[::-1][:DRAWS_SHOWN]
        shown = counts[row] > 0
        assert np.array_equal(logprobs[row][shown].astype(np.float32), wanted)
        assert set(ids[row][shown]) <= set(targets.tail_ids[row][drawn])


def test_a_student_that_is_the_teacher_has_its_probabilities_and_no_divergence(
    folder: Path, reader: CacheReader
) -> None:
    import torch

    model = load_causal_lm(str(folder / "teacher"), dtype=torch.float32)
    label = reader.manifest.label
    examples = [reader.example(i) for i in range(len(reader))]
    rows = student_rows(model, read_head(model), examples[0], label)
    targets = examples[0].targets
    teacher = soft_labels(targets, label.temperatures, 1.0, "sampled").log_probs[:, : label.head_size]
    np.testing.assert_allclose(rows.head, teacher, atol=0.13)  # log-probabilities are stored coarsely
    np.testing.assert_allclose(rows.gold, targets.gold_logprobs, atol=0.13)
    kl = np.concatenate([student_rows(model, read_head(model), example, label).kl for example in examples])
    assert abs(kl.mean()) < 4 * kl.std() / len(kl) ** 0.5  # an estimate, by draws
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    other = np.concatenate([student_rows(model, read_head(model), example, label).kl for example in examples])
    assert other.mean() > kl.mean() + 4 * kl.std() / len(kl) ** 0.5


def test_tokens_have_their_text(reader: CacheReader) -> None:
    files = reader.tokenizer_files()
    example = reader.example(3)
    texts = token_texts(files, example.input_ids.tolist())
    from logitcask.pipeline.text.tokenizer import tokenizer_from_files

    whole = tokenizer_from_files(files).decode(example.input_ids, skip_special_tokens=False)
    assert "".join(texts[i] for i in example.input_ids.tolist()) == whole
    assert token_texts({}, [3]) == {3: "[3]"}
