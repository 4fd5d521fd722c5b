"""Plain top-k columns, as ``cache export`` and many others write them, and the columns of axolotl.

Plain: ``input_ids``, ``token_ids`` and ``logprobs`` (lists of lists, one row per position), and, if there are any,
``labels`` or ``target_mask``, ``log_rest`` and ``gold_logprobs``. axolotl, as its data set is prepared: ``input_ids``,
``labels``, ``target_token_ids``, ``target_logprobs``; as it is given to axolotl: ``messages`` and ``logprobs``, either
numbers beside ``target_token_ids`` or objects ``{"token": "token_id:7", "logprob": -0.1}``, for the last tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import first_line
from logitcask.cache.labels import IntArray
from logitcask.pipeline.labels_from.rows import LabelledText, column, entries, floats, places, targets_of, token_ids
from logitcask.pipeline.text.columns import RecordError


def read_topk(record: Mapping[str, Any]) -> Iterator[LabelledText]:
    """Yield the text and rows of a record with plain columns. Raises RecordError if they do not fit each other."""
    names = ("token_ids", "logprobs")
    yield _columns(record, names, {name: record.get(name) for name in ("log_rest", "gold_logprobs")})


def read_axolotl(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[LabelledText]:
    """Yield the text and rows of a record of axolotl's, prepared or not. Raises RecordError if it is neither."""
    if record.get("input_ids") is not None:
        yield _columns(record, ("target_token_ids", "target_logprobs"), {})
        return
    text = _tokenized(column(record, "messages"), tokenizer)
    given, ids = column(record, "logprobs"), record.get("target_token_ids")
    if ids is None:
        given, ids = _named_entries(given)
    tokens, values = entries(ids, given, ("target_token_ids", "logprobs"))
    if len(tokens) > len(text):
        raise RecordError(f"logprobs: must be at most one row per token of messages, {len(text)}, got {len(tokens)}")
    yield LabelledText(
        text, np.ones(len(text), dtype=bool), np.arange(len(text) - len(tokens), len(text)), tokens, values
    )


def _columns(record: Mapping[str, Any], names: tuple[str, str], more: Mapping[str, Any]) -> LabelledText:
    text = token_ids(record, "input_ids")
    ids, values = entries(column(record, names[0]), column(record, names[1]), names)
    wanted, mask = targets_of(record, len(text))
    at = places(len(ids), len(text), mask, names[0])
    rest, gold = (
        None if more.get(name) is None else floats(more[name], name, len(ids)) for name in ("log_rest", "gold_logprobs")
    )
    bare = "log_rest" in record and record["log_rest"] is None
    return LabelledText(text, wanted, at, ids, values, rest, bare=bare, gold=gold)


def _tokenized(messages: Any, tokenizer: PreTrainedTokenizerBase) -> IntArray:
    """Return the token ids of a whole chat by the tokenizer's template. Raises RecordError if it refuses the chat."""
    if not tokenizer.chat_template:
        raise RecordError("messages: need a tokenizer with a chat template, which --tokenizer has not")
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception as error:  # a template is a program, and may raise anything
        raise RecordError(f"messages: the chat template rejects them: {first_line(error)}") from error
    return np.asarray(ids, dtype=np.int64)


def _named_entries(rows: Any) -> tuple[list[list[float]], list[list[int]]]:
    """Return values and ids of rows of ``{"token": "token_id:7", "logprob": -0.1}``."""
    values, ids = [], []
    for number, row in enumerate(rows if isinstance(rows, Sequence) else ()):
        try:
            values.append([float(entry["logprob"]) for entry in row or ()])
            ids.append([int(entry["token"].rpartition("token_id:")[2]) for entry in row or ()])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(
                f'logprobs: row {number} must hold {{"token": "token_id:7", "logprob": -0.1}}, or add target_token_ids'
            ) from error
    return values, ids
