"""Records that are token ids already: labels or masks, packed rows, and what is checked of them."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from tests.support.tiny import make_tokenizer

IDS = [5, 6, 7, 8, 9, 10]
LABELS = [-100, 6, 7, -100, 9, 10]
TWO = [([5, 6, 7], [6, 7]), ([8, 9, 10], [9, 10])]  # ids and targets of each row


def rows(**record: Any) -> list[tuple[list[int], list[int]]]:
    """Return the token ids and the targets of each example."""
    examples = Encoder(make_tokenizer(), prompt_loss=False, report=lambda _: None).examples(record)
    return [(e.input_ids.tolist(), e.input_ids[1:][e.target_mask[:-1]].tolist()) for e in examples]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"labels": LABELS}, [(IDS, [6, 7, 9, 10])]),
        ({"target_mask": [0, 1, 1, 0, 1, 1]}, [(IDS, [6, 7, 9, 10])]),
        ({"labels": LABELS, "seq_lengths": [3, 3]}, TWO),
        ({"labels": LABELS, "position_ids": [0, 1, 2, 0, 1, 2]}, TWO),
        ({"target_mask": [True] * 6, "position_ids": [0, 1, 2, 0, 1, 2]}, TWO),
        ({"labels": [-100] * 4 + [9, 10], "seq_lengths": [3, 3]}, TWO[1:]),  # a row without a target is no example
        ({"labels": [-100, 6, 7, -100, -100, -100], "position_ids": [0, 1, 2, 0, 0, 0]}, TWO[:1]),  # padding
        ({"labels": LABELS, "attention_mask": [1] * 6}, [(IDS, [6, 7, 9, 10])]),
    ],
)
def test_rows(record: dict[str, Any], wanted: list[tuple[list[int], list[int]]]) -> None:
    assert rows(input_ids=IDS, **record) == wanted


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"input_ids": [5, 300], "labels": [5, 300]}, "input_ids must be from 0 to 299, got 5 to 300"),
        ({"input_ids": [5, -1], "labels": [5, -1]}, "input_ids must be from 0 to 299, got -1 to 5"),
        ({"input_ids": [5, 6.5], "labels": [5, 6]}, "input_ids must be a list of integers"),
        ({"input_ids": [[5, 6]], "labels": [[5, 6]]}, "input_ids must be a list of integers"),
        ({"input_ids": [], "labels": []}, "input_ids must be a list of integers that is not empty"),
        ({"labels": IDS[:5]}, "labels must have as many entries as input_ids, 6, got 5"),
        ({"labels": [-100, 6, 7, -100, 9, 11]}, "labels must be -100 or equal to input_ids at the same place"),
        ({"labels": [-100] * 6}, "no target"),
        ({"target_mask": [0, 1, 2, 0, 1, 1]}, "target_mask must hold 0 and 1 alone"),
        ({"target_mask": [0, 1, 1, 0, 1, 1], "token_ids": [[1]], "logprobs": [[0.0]]}, "marks the positions before"),
        ({"labels": LABELS, "seq_lengths": [3, 4]}, "sum to the number of input_ids, 6"),
        ({"labels": LABELS, "seq_lengths": [6, 0]}, "seq_lengths must be positive"),
        ({"labels": LABELS, "position_ids": [0, 1, 2, 0, 1]}, "position_ids must have 6 entries, got 5"),
        ({"labels": LABELS, "position_ids": [1, 2, 3, 0, 1, 2]}, "position_ids must start at 0, got 1"),
        ({"labels": LABELS, "position_ids": [0, 1, 2, 0, 2, 4]}, "position_ids must count up by 1 from each 0"),
    ],
)
def test_what_does_not_fit_is_refused(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        rows(**{"input_ids": IDS, **record})


def test_ids_with_gaps() -> None:
    """As of tokens that were added at a reserved place: the largest id is more than the number of tokens."""
    tokenizer = make_tokenizer()
    tokenizer_json = json.loads(tokenizer.backend_tokenizer.to_str())
    last = max(tokenizer_json["model"]["vocab"], key=tokenizer_json["model"]["vocab"].get)
    tokenizer_json["model"]["vocab"][last] = 310
    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer_json)))
    assert len(gapped) <= 300
    encoder = Encoder(gapped, prompt_loss=False, report=lambda _: None)
    (example,) = encoder.examples({"input_ids": [5, 310], "labels": [5, 310]})
    assert example.input_ids.tolist() == [5, 310]
    with pytest.raises(RecordError, match="input_ids must be from 0 to 310, got 5 to 311"):
        encoder.examples({"input_ids": [5, 311], "labels": [5, 311]})
