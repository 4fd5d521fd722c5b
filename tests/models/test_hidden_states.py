"""What a row's hidden states depend on: not on the examples beside it, nor on the tokens that follow.

Legend: L tokens, H width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.evaluate.on_cache import evaluate_on_cache
from logitcask.pipeline.models.head import keeps_apart, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.train.sources.teacher import load_online_teacher
from tests.models.test_head import VOCABULARY, tiny
from tests.support.tiny import make_cache, make_tokenizer

LENGTHS = (5, 12, 8, 9)
SHORT = 8
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 3.0, 6.0, 9.0]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
OF_TWO = {**LONG_ROPE, "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0], "original_max_position_embeddings": SHORT}
LONG: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": SHORT}),
    ("minicpm3", {"rope_parameters": OF_TWO, "dim_model_base": 10, "num_key_value_heads": 4}),
]


def one_row_alone(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **how: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' flash attention does on a GPU: it takes packed examples apart if there is one row."""
    length = query.shape[2]
    mask, positions = torch.ones(length, length, dtype=torch.bool).tril(), how.pop("position_ids", None)
    if len(query) == 1 and positions is not None:
        example = (positions[0] == 0).cumsum(0)
        mask &= example[:, None] == example[None]
    out, _ = sdpa_attention_forward(module, query, key, value, mask[None, None], **{**how, "is_causal": False})
    return out, None


@pytest.fixture
def flash() -> str:
    AttentionInterface.register("one_row_alone", one_row_alone)
    return "one_row_alone"


def seen_by(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Return the hidden states (L, H) of rows in one padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        hidden = last_hidden_states(model, ids, lengths=torch.tensor([len(row) for row in rows]))
    return [hidden[i, : len(row)] for i, row in enumerate(rows)]


def test_attention_that_keeps_examples_of_one_row_apart_leaks_in_two(flash: str) -> None:
    model = tiny("llama")
    assert keeps_apart(model)
    model.set_attn_implementation(flash)
    ids, positions = torch.arange(14)[None], torch.tensor([[*range(5), *range(9)]])
    alone = torch.cat([last_hidden_states(model, ids[:, :5]), last_hidden_states(model, ids[:, 5:])], dim=1)
    torch.testing.assert_close(last_hidden_states(model, ids, positions), alone, rtol=1e-4, atol=1e-5)
    assert not keeps_apart(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_to_16_bits_is_not_a_leak(flash: str, autocast: bool) -> None:
    model = tiny("llama")
    model = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert keeps_apart(model)
        read_head(model)
        model.set_attn_implementation(flash)
        assert not keeps_apart(model)


@pytest.mark.parametrize(("model_type", "settings"), LONG)
def test_long_rope_does_not_depend_on_the_longest_row(model_type: str, settings: dict[str, Any]) -> None:
    """In transformers all rows of a batch have the embeddings of its longest."""
    model = tiny(model_type, **settings)
    rows = [torch.arange(1, 1 + length) * 5 % VOCABULARY for length in LENGTHS]
    with torch.no_grad():
        alone = [last_hidden_states(model, row[None])[0] for row in rows]
        mixed = last_hidden_states(model, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    for hidden, wanted in zip(seen_by(model, rows), alone, strict=True):
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
    assert float((mixed[0, :5] - alone[0]).norm() / alone[0].norm()) > 0.01
    for part in (rows[:1] + rows[2:3], rows[1:2] + rows[3:]):  # all short, all long
        for hidden, row in zip(seen_by(model, part), part, strict=True):
            torch.testing.assert_close(hidden, alone[LENGTHS.index(len(row))], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_tokens_see_what_follows_is_refused(dtype: torch.dtype) -> None:
    read_head(tiny("gemma3_text").to(dtype))
    with pytest.raises(LogitcaskError, match="its tokens see those that follow"):
        read_head(tiny("gemma3_text", use_bidirectional_attention=True).to(dtype))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LongRoPE teacher, and its caches, labelled in batches of one and of several examples, short ones and long."""
    folder = tmp_path_factory.mktemp("long")
    model = tiny("phi3", vocab_size=300, **{**LONG[0][1], "original_max_position_embeddings": 20})
    model.save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    for size in (1, 8):
        make_cache(folder, folder / "teacher", output=folder / f"cache{size}", batch_size=size)
    return folder


def test_labels_do_not_depend_on_the_batch(place: Path) -> None:
    one, other = (CacheReader(place / f"cache{size}") for size in (1, 8))
    lengths = {len(one.example(index).input_ids) > 20 for index in range(len(one))}
    assert lengths == {True, False}
    for index in range(len(one)):
        alone, beside = one.example(index).targets, other.example(index).targets
        torch.testing.assert_close(torch.from_numpy(beside.log_partition), torch.from_numpy(alone.log_partition))


def test_an_evaluation_does_not_depend_on_the_batch(place: Path) -> None:
    model, reader = load_causal_lm(str(place / "teacher"), dtype=torch.float32).eval(), CacheReader(place / "cache1")
    alone, beside = (evaluate_on_cache(model, reader, None, size) for size in (1, 8))
    assert beside.hard_loss == pytest.approx(alone.hard_loss, rel=1e-5)
    assert beside.kl[0].kl == pytest.approx(alone.kl[0].kl, abs=1e-5)


def test_a_teacher_in_memory_does_not_depend_on_the_batch(place: Path) -> None:
    teacher = load_online_teacher(str(place / "teacher"), 300, torch.device("cpu"))
    assert not teacher.packs  # examples of one row would have the embeddings of the longest
    source = CacheExamples(str(place / "cache1"), with_targets=False)
    collate, examples = Collator(0, (), 1.0, "sampled"), [source[index] for index in range(8)]
    alone = torch.cat([teacher(collate([example])).logits(slice(None)) for example in examples])
    torch.testing.assert_close(teacher(collate(examples)).logits(slice(None)), alone, rtol=1e-4, atol=1e-4)
