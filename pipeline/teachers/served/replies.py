"""Requests that have a text scored, and the heads in the replies: those of vLLM's and SGLang's own protocols.

Legend: L tokens of a text, N positions wanted, K head tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.cache.labels import FloatArray, IntArray, SparseTargets
from logitcask.pipeline.teachers.sparsify import head_only

NONE = -9000.0  # vLLM writes -9999 for minus infinity, which JSON lacks
MOST_MASS = 1.01  # of a head; above it the numbers are no log-probabilities
Entry = tuple[int, float]  # id and log-probability
Row = tuple[float, list[Entry]]  # of a position: the log-probability of the token after it, and the head


class ReplyError(Exception):
    """A reply is not the labels of the text."""


@dataclass(frozen=True)
class Protocol:
    """How a kind of server is asked for the heads of a text from one position on, and how it answers."""

    name: str
    path: str
    body: Callable[[str, Sequence[int], int, int], dict[str, Any]]  # of a model's name, a text, its first position, K
    rows: Callable[[Any, Sequence[int], int, int], list[Row]]  # of a reply, a text, its first position, K


def remedy_of_cap(head_size: int) -> str:
    """Return what to do about a server that gives fewer tokens than asked."""
    return f"start vLLM with --max-logprobs {head_size} or more, or lower --head-size from {head_size}"


def read_head(
    protocol: Protocol, reply: Any, text: IntArray, at: IntArray, head_size: int, vocab_size: int
) -> SparseTargets:
    """Return the labels of the positions ``at``, (N,), of a text, (L,).

    Raises ReplyError, with the position, if the reply holds anything else than log-probabilities of this text's tokens
    and of the K most probable ones.
    """
    tokens, first = text.tolist(), int(at[0])
    try:
        rows = protocol.rows(reply, tokens, first, head_size)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ReplyError(f"is of another form than expected: {type(error).__name__}: {error}") from error
    n = len(at)
    ids, values = np.zeros((n, head_size), dtype=np.int64), np.zeros((n, head_size), dtype=np.float32)
    gold = np.zeros(n, dtype=np.float32)
    for place, position in enumerate(at.tolist()):
        gold[place], entries = rows[position - first]
        if len(entries) != head_size:
            raise ReplyError(
                f"has {len(entries)} of {head_size} entries at position {position}: {remedy_of_cap(head_size)}"
            )
        ids[place], values[place] = zip(*entries, strict=True)
    values, gold = (np.where(each <= NONE, np.float32(-np.inf), each) for each in (values, gold))
    _require_labels(ids, values, gold, at, vocab_size)
    return head_only(ids, values, gold, text[at + 1], vocab_size)


def _require_labels(ids: IntArray, values: FloatArray, gold: FloatArray, at: IntArray, vocab_size: int) -> None:
    """Raise ReplyError at the first position whose numbers cannot be a head."""
    ordered = np.sort(ids, axis=1)
    with np.errstate(over="ignore"):
        mass = np.exp(values.astype(np.float64)).sum(1)
    for wrong, reason in (
        (~(gold < 1e3) | ~(values < 1e3).all(1), "a log-probability is not a number"),
        (
            ((ids < 0) | (ids >= vocab_size)).any(1),
            f"a token is outside the tokenizer's {vocab_size:,}: the model has more; lower --head-size",
        ),
        ((ordered[:, 1:] == ordered[:, :-1]).any(1), "a token stands twice"),
        (
            (mass > MOST_MASS) | (gold > np.log(MOST_MASS)),
            "the probabilities sum to more than 1: the server must give log-probabilities of the model "
            "(vLLM: --logprobs-mode raw_logprobs)",
        ),
    ):
        if wrong.any():
            raise ReplyError(f"is no label at position {at[int(wrong.argmax())]}: {reason}")


def _vllm_body(model: str, text: Sequence[int], first: int, head_size: int) -> dict[str, Any]:
    sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    return {"model": model, "prompt": list(text), "prompt_logprobs": head_size, **sampling}


def _vllm_rows(reply: Any, text: Sequence[int], first: int, head_size: int) -> list[Row]:
    """Return rows of vLLM's ``prompt_logprobs``, which hold a token's own entry beside the K most probable."""
    scored: list[Mapping[str, Any]] | None = reply["choices"][0].get("prompt_logprobs")
    if scored is None:
        raise ReplyError("has no prompt_logprobs: the server must be vLLM's own")
    if len(scored) != len(text):
        raise ReplyError(f"has {len(scored)} rows of prompt_logprobs for {len(text)} tokens")
    rows = []
    for place in range(first + 1, len(text)):
        own = scored[place].get(str(text[place]))
        if own is None:
            raise ReplyError(f"lacks the text's own token at position {place - 1}: it is of another text")
        ranked = sorted(scored[place].items(), key=lambda item: (-_number(item[1]["logprob"]), item[1]["rank"]))
        if len(ranked) > head_size or own["rank"] > head_size:
            ranked = [item for item in ranked if item[1] is not own]
        rows.append((_number(own["logprob"]), [(int(token), _number(entry["logprob"])) for token, entry in ranked]))
    return rows


def _sglang_body(model: str, text: Sequence[int], first: int, head_size: int) -> dict[str, Any]:
    return {
        "input_ids": list(text),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": first,
        "top_logprobs_num": head_size,
    }


def _sglang_rows(reply: Any, text: Sequence[int], first: int, head_size: int) -> list[Row]:
    """Return rows of SGLang's ``meta_info``, entries of which are [log-probability, id, text]; the first is null.

    It writes 0 for the id of the last token of its vocabulary.
    """
    own, top = reply["meta_info"]["input_token_logprobs"], reply["meta_info"].get("input_top_logprobs")
    if top is None:
        raise ReplyError("has no input_top_logprobs: the server must be SGLang's own")
    if len(own) != len(top) or len(own) != len(text) - first:
        raise ReplyError(f"has {len(own)} and {len(top)} rows for {len(text) - first} tokens")
    rows = []
    for token, entry, entries in zip(text[first + 1 :], own[1:], top[1:], strict=True):
        if entry[1] not in (token, 0):
            raise ReplyError(f"is of another text: it has token {entry[1]} where {token} was sent")
        ranked = sorted(((int(one[1]), _number(one[0])) for one in entries), key=lambda one: -one[1])
        rows.append((_number(entry[0]), ranked))
    return rows


def _number(value: Any) -> float:
    """Return a number; null, which stands for NaN in JSON, as NaN."""
    return float("nan") if value is None else float(value)


VLLM = Protocol("vllm", "/v1/completions", _vllm_body, _vllm_rows)
SGLANG = Protocol("sglang", "/generate", _sglang_body, _sglang_rows)
