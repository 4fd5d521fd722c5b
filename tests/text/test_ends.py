"""Begin and end tokens that a text has already are not added again; halves of characters are refused with their place.

Tokenizers of three kinds: byte-level BPE, SentencePiece's with a blank before a text, and the same done by normalizers.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import read_records
from logitcask.pipeline.text.tokens.encoded import Encoded
from tests.support.tiny import make_tokenizer

PIECES = ["<unk>", "<s>", "</s>", "▁", "\n", "a", "b", "c", "▁a", "▁b", "▁c"]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def unigram(*, legacy: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([(p, -float(len(PIECES) - i)) for i, p in enumerate(PIECES)], unk_id=0))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer, which now puts a begin token before every text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


TOKENIZERS = {
    "byte-level": lambda: beginning(byte_level()),
    "SentencePiece": lambda: beginning(unigram(legacy=False)),
    "legacy SentencePiece": lambda: beginning(unigram(legacy=True)),
}


def encode(tokenizer: PreTrainedTokenizerFast, **record: str) -> Encoded:
    return Encoder(tokenizer, prompt_loss=False).examples(record)[0]


def ends(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> tuple[int, int]:
    """Return how many begin and end tokens an example has."""
    ids = encoded.input_ids.tolist()
    return ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["a b c", "<s>a b c", "a b c</s>", "<s>a b c</s>", "<s><s>a b c</s></s>"])
def test_a_text_has_one_begin_and_one_end_token(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoded = encode(tokenizer, text=text)
    ids = encoded.input_ids.tolist()
    assert ends(tokenizer, encoded) == (1, 1)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert encoded.target_mask.tolist() == [True] * (len(ids) - 1) + [False]
    if "<s>" not in text:  # the end token's string changes nothing else
        assert ids == encode(tokenizer, text="a b c").input_ids.tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "response"), [("a b", "c"), ("<s>a b", "c</s>"), ("", "<s>a</s>"), ("a", "b</s></s>")]
)
def test_a_response_ends_with_one_end_token_that_is_a_target(kind: str, prompt: str, response: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoded = encode(tokenizer, prompt=prompt, response=response)
    assert ends(tokenizer, encoded) == (1, 1)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.target_mask[-2:].tolist() == [True, False]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_white_space_after_the_end_token_is_kept_and_no_target(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    for record in ({"text": "<s>a b</s>\n"}, {"prompt": "a", "response": "b</s>\n"}):
        encoded = encode(tokenizer, **record)
        assert ends(tokenizer, encoded) == (1, 1)
        place = encoded.input_ids.tolist().index(tokenizer.eos_token_id)
        assert tokenizer.decode(encoded.input_ids[place + 1 :].tolist()) == "\n"
        assert encoded.target_mask[place - 1]
        assert not encoded.target_mask[place:].any()


def test_a_rendered_chat_as_text_has_the_tokens_of_the_chat() -> None:
    tokenizer = make_tokenizer(chat=True)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = Encoder(tokenizer, prompt_loss=False)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    text, messages = encoder.examples({"text": rendered})[0], encoder.examples({"messages": chat})[0]
    assert text.input_ids.tolist() == messages.input_ids.tolist()


@pytest.mark.parametrize("answer", ["b<|im_end|>", "b<|im_end|>\n", "b<|im_end|><|im_end|>"])
def test_a_chat_has_one_end_token_per_turn(answer: str) -> None:
    tokenizer = make_tokenizer(chat=True)
    encoder = Encoder(tokenizer, prompt_loss=False)
    wanted = encoder.examples({"prompt": "a", "response": "b"})[0]
    for record in (
        {"prompt": "a", "response": answer},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]},
    ):
        encoded = encoder.examples(record)[0]
        assert encoded.input_ids.tolist() == wanted.input_ids.tolist()
        assert encoded.target_mask.tolist() == wanted.target_mask.tolist()


def test_a_chat_template_writes_the_begin_token_of_a_chat_once() -> None:
    tokenizer = beginning(byte_level())
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    encoded = encode(tokenizer, prompt="<s>a", response="b</s>")
    assert tokenizer.decode(encoded.input_ids.tolist()) == "<s>a</s>b</s>"


def test_the_string_of_another_token_does_not_end_a_text() -> None:
    tokenizer = beginning(byte_level())
    encoded = encode(tokenizer, text="a <|endoftext|>")  # the end token before it was changed
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.input_ids.tolist()) == "<s>a <|endoftext|></s>"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "response": "Here \ud83d you go"},
        {"text": "\udc00"},
        {"messages": [{"role": "user", "content": "x\ud83d"}, {"role": "assistant", "content": "y"}]},
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_line(record: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"text": "\U0001f600 \\ud83d"}) + "\n" + json.dumps(record) + "\n")
    encoder, records = Encoder(make_tokenizer(chat=True), prompt_loss=False), read_records([str(file)])
    _, whole = next(records)
    assert isinstance(whole, dict)
    assert whole == {"text": "\U0001f600 \\ud83d"}  # a whole pair, and the six characters themselves
    assert encoder.examples(whole)
    where, half = next(records)
    assert where == f"{file}:2"
    assert isinstance(half, dict)
    with pytest.raises(RecordError, match=r"\w+ holds half a surrogate pair, at character"):
        encoder.examples(half)


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_a_token_that_ends_nothing_may_stand_twice(prompt_loss: bool) -> None:
    """Only control tokens are taken for ends; an empty text has none."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<br>"])
    for text in ("a<br><br>", "a"):
        (encoded,) = Encoder(tokenizer, prompt_loss=prompt_loss).examples({"prompt": "b", "response": text})
        assert tokenizer.decode(encoded.input_ids.tolist()) == f"b{text}</s>"
