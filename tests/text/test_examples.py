"""From records to tokens, shards and batches: the right label at the right token, every example exactly once.

The alignment tests use a real Llama that predicts a known permutation: its layers add nothing, its embeddings are
orthogonal, and its head's rows are permuted, so that after token v it is almost certain of permutation[v].
"""

import functools
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.cache.layout import CHUNK
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import BatchSampler, held_out
from logitcask.pipeline.precompute.sharding import cut_shards, plan_batches, plan_strides, shuffled
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import read_records
from logitcask.pipeline.text.token_table import TokenTable, write_table
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.text.tokens.log import TokenLog
from logitcask.pipeline.text.tokens.stage import pack
from tests.support.tiny import RECORDS, make_cache, make_teacher, make_tokenizer, write_jsonl

VOCAB = 300
TURNS = ("system", "user", "assistant", "user", "assistant", "user")
CHATS: list[dict[str, object]] = [
    {
        "messages": [
            {"role": role, "content": f"{n}{'ab'[: n % 3]}{turn}"} for turn, role in enumerate(TURNS[: 3 + n % 4])
        ]
    }
    for n in range(9)
]
TEXTS: list[dict[str, object]] = [{"text": f"{r['prompt']}{r['response']}"} for r in RECORDS[:9]]
quick = settings(deadline=None, max_examples=30, derandomize=True)


@functools.cache
def permutation(chat: bool) -> IntArray:
    """Return each token's successor: some of the data's own transitions, so that the gold token is sometimes likely."""
    tokenizer = make_tokenizer(vocab_size=VOCAB, chat=chat)
    leads: dict[int, int] = {}
    for record in CHATS if chat else RECORDS:
        for token, follower in pairwise(encoded_text(tokenizer, record)):
            if token not in leads and follower not in leads.values():
                leads[token] = follower
    rest = sorted(set(range(VOCAB)) - set(leads.values()), reverse=True)
    return np.array([leads[token] if token in leads else rest.pop() for token in range(VOCAB)])


def make_permuting_teacher(folder: Path, *, chat: bool) -> Path:
    make_teacher(folder, vocab_size=VOCAB, chat=chat)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=VOCAB,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.copy_(torch.eye(VOCAB)[np.argsort(permutation(chat))])
    shutil.rmtree(folder / "model.safetensors", ignore_errors=True)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {chat: make_permuting_teacher(folder / f"chat-{chat}", chat=chat) for chat in (False, True)}


def responses(record: dict[str, object], ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the indices of the tokens that belong to a response, found in the text without the Encoder."""
    if "text" in record:
        return list(range(1, len(ids)))
    places: list[int] = []
    if "messages" in record:
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        prefix = [start, *tokenizer.encode("assistant\n")]
        for t in range(len(ids)):
            if ids[t : t + len(prefix)] == prefix:
                stop = ids.index(end, t + len(prefix)) if end in ids[t + len(prefix) :] else len(ids) - 1
                places += range(t + len(prefix), stop + 1)
        return places
    return list(range(len(tokenizer.encode(str(record["prompt"]))), len(ids)))


@pytest.mark.parametrize("kind", ["prompt", "messages", "text"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("cut", [False, True])
def test_labels_stand_at_the_tokens_that_predict_the_response(
    tmp_path: Path, teachers: dict[bool, Path], kind: str, batch_size: int, cut: bool
) -> None:
    max_seq_length = (50 if kind == "messages" else 18) if cut else 128
    records = {"prompt": RECORDS, "messages": CHATS, "text": TEXTS}[kind]
    write_jsonl(tmp_path / "train.jsonl", records)
    cache = make_cache(
        tmp_path,
        teachers[kind == "messages"],
        train_data=str(tmp_path / "train.jsonl"),
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        head_size=1,
        tail_draws=2,
    )
    tokenizer = make_tokenizer(vocab_size=VOCAB, chat=kind == "messages")
    reader = CacheReader(cache)
    kept = [r for r in records if responses(r, encoded_text(tokenizer, r)[:max_seq_length], tokenizer)]
    order, leads, longest, likely = shuffled(len(kept), 0), permutation(kind == "messages"), 0, 0
    for index in range(len(reader)):
        example = reader.example(index)
        ids = example.input_ids.tolist()
        record = kept[order[index]]
        assert ids == encoded_text(tokenizer, record)[:max_seq_length]
        want = [place - 1 for place in responses(record, ids, tokenizer)]
        np.testing.assert_array_equal(np.flatnonzero(example.target_mask), want)
        np.testing.assert_array_equal(example.targets.head_ids[:, 0], leads[example.input_ids[want]])
        predicted = leads[example.input_ids[want]] == example.input_ids[np.array(want) + 1]
        np.testing.assert_array_equal(example.targets.gold_logprobs > -1.0, predicted)
        longest, likely = longest + (len(ids) == max_seq_length), likely + int(predicted.sum())
    assert len(reader) == len(kept) == len(records) - reader.manifest.data.dropped
    assert (longest > 0) == cut
    assert likely >= 5
    assert_batches_agree(cache, leads)


def encoded_text(tokenizer: PreTrainedTokenizerFast, record: dict[str, object]) -> list[int]:
    """Return the tokens of a whole record, without the Encoder."""
    if "messages" in record:
        text: str = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        ids: list[int] = tokenizer.encode(text)
        return ids
    parts = [record["text"]] if "text" in record else [record["prompt"], record["response"]]
    return [i for part in parts for i in tokenizer.encode(str(part))] + [tokenizer.eos_token_id]


def assert_batches_agree(cache: Path, leads: IntArray) -> None:
    """Check that padded batches, with their flattened index, hold the same labels at the same tokens."""
    examples = CacheExamples(str(cache), with_targets=True)
    collate = Collator(pad_id=0, temperatures=(1.0, 1.5, 2.0), temperature=2.0, tail="sampled")
    for first in range(0, len(examples), 4):
        batch = collate([examples[i] for i in range(first, min(first + 4, len(examples)))])
        flat, index = batch["input_ids"].reshape(-1), batch["target_index"]
        np.testing.assert_array_equal(batch["soft_labels"].ids[:, 0], leads[flat[index]])
        assert torch.equal(batch["gold"], flat[index + 1])


def encode(tokenizer: PreTrainedTokenizerFast, record: dict[str, object], *, prompt_loss: bool = False) -> Encoded:
    (example,) = Encoder(tokenizer, prompt_loss=prompt_loss).examples(record)
    return example


def test_a_response_ends_with_the_end_token_and_only_it_is_a_target() -> None:
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, {"prompt": "ab", "response": "cd"})
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    assert encoded.input_ids.tolist() == [a, b, c, d, tokenizer.eos_token_id]
    assert encoded.target_mask.tolist() == [False, True, True, True, False]
    with_prompt = encode(tokenizer, {"prompt": "ab", "response": "cd"}, prompt_loss=True)
    assert with_prompt.target_mask.tolist() == [True] * 4 + [False]


def test_prompt_and_response_are_encoded_separately() -> None:
    tokenizer = make_tokenizer()
    whole = tokenizer.encode("There are")
    assert len(whole) == 2  # "There" is one token of the tiny vocabulary
    encoded = encode(tokenizer, {"prompt": "The", "response": "re are"})
    assert encoded.input_ids.tolist() == [*tokenizer.encode("The"), *tokenizer.encode("re are"), tokenizer.eos_token_id]


def test_a_begin_token_is_put_where_the_tokenizer_puts_one_and_is_no_target() -> None:
    plain = make_tokenizer()
    assert encode(plain, {"text": "ab"}).input_ids[0] == plain.encode("a")[0]
    plain.add_special_tokens({"bos_token": "<s>"})
    assert encode(plain, {"text": "ab"}).input_ids[0] == plain.encode("a")[0]
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.bos_token_id)]
    )
    encoded = encode(plain, {"text": "ab"})
    assert encoded.input_ids[0] == plain.bos_token_id
    assert encoded.target_mask.tolist() == [True, True, True, False]
    encoded = encode(plain, {"prompt": "ab", "response": "c"})
    assert encoded.input_ids.tolist().count(plain.bos_token_id) == 1
    assert encoded.target_mask.tolist() == [False, False, True, True, False]


def test_a_sentencepiece_tokenizer_puts_no_blank_inside_a_text() -> None:
    pieces = ["<unk>", "</s>", "▁", "\n", "a", "b", "c", "▁a", "▁b", "▁c", "ab"]
    backend = Tokenizer(models.Unigram([(p, -float(len(pieces) - i)) for i, p in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("c")) == ["▁c"]
    encoded = encode(tokenizer, {"prompt": "a", "response": "c b"})
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()) == ["▁a", "c", "▁b", "</s>"]
    assert encoded.target_mask.tolist() == [True, True, True, False]
    spaced = encode(tokenizer, {"prompt": "a", "response": " c"})
    assert tokenizer.convert_ids_to_tokens(spaced.input_ids.tolist()) == ["▁a", "▁c", "</s>"]


def test_a_chat_with_several_turns_has_each_assistant_turn_as_target() -> None:
    tokenizer = make_tokenizer(chat=True)
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    encoded = encode(tokenizer, {"messages": [{"role": role, "content": text} for role, text in chat]})
    targets = encoded.input_ids[1:][encoded.target_mask[:-1]].tolist()
    assert tokenizer.decode(targets) == "b<|im_end|>d<|im_end|>"
    assert tokenizer.decode(encoded.input_ids.tolist()).count("<|im_start|>") == 4
    as_prompt = encode(tokenizer, {"prompt": "a", "response": "b"})
    assert tokenizer.decode(as_prompt.input_ids.tolist()) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, r"has columns \['prompt'\]; needs messages"),
        ({"prompt": "a", "response": " \n"}, "response needs text"),
        ({"question": "a"}, r"has columns \['question'\]; needs messages"),
        ({"text": 3}, "must be a string, got int"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template|no assistant turn"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_records_without_a_target_are_refused_with_their_location(
    record: dict[str, object], message: str, chat: bool
) -> None:
    with pytest.raises(RecordError, match=message):
        encode(make_tokenizer(chat=chat), record)


def test_records_are_read_with_their_location(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_records([str(path)])) == [(f"{path}:1", {"text": "a"}), (f"{path}:3", {"text": "b"})]


def stage(folder: Path, examples: list[tuple[int, list[int]]], limit: int) -> TokenTable:
    """Return a table of examples, each given by its length and target positions."""
    encoded = [Encoded(np.arange(n), np.isin(np.arange(n), at)) for n, at in examples]
    with TokenLog(folder) as log:
        return write_table([pack(encoded, limit)], log, max_seq_length=limit, prompt_loss=False, source="data")


def test_long_examples_are_truncated_and_dropped_if_no_target_is_left(tmp_path: Path) -> None:
    table = stage(tmp_path, [(3, [0, 1]), (8, [2, 3, 4, 6]), (9, [6, 7]), (9, [4, 7]), (5, [0])], limit=5)
    assert (table.identity.truncated, table.identity.dropped, table.identity.examples) == (3, 2, 3)
    assert (table.identity.tokens, table.identity.positions) == (13, 5)
    masks = [np.flatnonzero(table.example(i).target_mask).tolist() for i in range(3)]
    assert masks == [[0, 1], [2, 3], [0]]  # position 4 of a cut example predicts a token that was cut off
    assert table.positions.tolist() == [2, 2, 1]
    assert table.example(1).input_ids.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(LogitcaskError, match=r"--max-seq-length 2: raise it \(1 dropped\)"):
        stage(tmp_path, [(9, [4])], limit=2)


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=40), st.integers(1, 20))
def test_shards_are_whole_examples_up_to_their_limit(positions: list[int], limit: int) -> None:
    cuts = cut_shards(np.array(positions), limit)
    assert cuts.sum() == len(positions)
    assert cuts.min() >= 1
    ends = np.cumsum(cuts)
    for first, end in zip(ends - cuts, ends, strict=True):
        filled = sum(positions[first:end])
        assert filled <= limit or end - first == 1
        assert end == len(positions) or filled + positions[end] > limit
    tokens = np.array(positions) * 2 + 1
    plan = plan_strides(cuts, tokens, np.array(positions))
    assert plan.count == len(cuts)
    for stride, sizes in ((plan.examples, np.ones(len(positions))), (plan.tokens, tokens), (plan.positions, positions)):
        assert stride == max(np.sum(sizes[a:b]) for a, b in zip(ends - cuts, ends, strict=True))


def test_long_strides_are_whole_chunks() -> None:
    long = CHUNK["position"] + 1
    plan = plan_strides(np.array([1, 1]), np.array([long, 3]), np.array([long, 2]))
    assert (plan.positions, plan.tokens) == (2 * CHUNK["position"], long)


@quick
@given(st.lists(st.integers(2, 64), min_size=1, max_size=60), st.integers(1, 300))
def test_batches_hold_each_example_once_within_their_limit(lengths: list[int], limit: int) -> None:
    batches = plan_batches(np.array(lengths), limit)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= limit or len(batch) == 1
    assert [max(lengths[i] for i in b) for b in batches] == sorted(max(lengths[i] for i in b) for b in batches)[::-1]


@quick
@given(st.integers(1, 200), st.integers(0, 2**62))
def test_the_shuffle_holds_each_example_once(examples: int, seed: int) -> None:
    assert sorted(shuffled(examples, seed).tolist()) == list(range(examples))
    np.testing.assert_array_equal(shuffled(examples, seed), shuffled(examples, seed))
    assert examples < 20 or (shuffled(examples, seed) != shuffled(examples, seed + 1)).any()


@quick
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=9),
    st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_an_epoch_holds_each_example_once_and_none_held_out(
    sizes: list[int], fraction: float, batch_size: int, seed: int
) -> None:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total = int(starts[-1])
    left_out = held_out(total, fraction, seed)
    assert len(left_out) == (0 if fraction == 0.0 else min(total - 1, max(1, round(total * fraction))))
    epochs = []
    for epoch in range(3):
        samplers = [BatchSampler(starts, left_out, batch_size, seed) for _ in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = list(samplers[0])
        assert batches == list(samplers[1])
        assert len(batches) == len(samplers[0])
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        epochs.append([i for batch in batches for i in batch])
        assert Counter(epochs[-1]) == Counter(set(range(total)) - set(left_out.tolist()))
        shards = np.searchsorted(starts, epochs[-1], side="right")
        assert (np.diff(shards) != 0).sum() == len(set(shards.tolist())) - 1  # each shard is read once
    assert epochs[0] == sorted(epochs[0]) or seed != 0
    assert epochs[0] != sorted(epochs[0]) or seed == 0 or len(epochs[0]) < 12
    assert len(epochs[0]) < 12 or (epochs[0] != epochs[1] != epochs[2] != epochs[0])
