"""Replies of servers: chat completions with ``top_logprobs``, vLLM's ``prompt_logprobs``, SGLang's ``meta_info``.

A record is a prompt with its reply: ``messages`` (or ``prompt``) and ``response``, the server's whole answer; or the
answer itself with ``messages`` in it. The ids of a reply's tokens come from the server (``token_id:7``, ids as keys) or
are found by their bytes in the tokenizer's vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from logitcask.cache.errors import first_line, shown
from logitcask.cache.labels import IntArray
from logitcask.pipeline.labels_from.rows import LabelledText, entries, integers
from logitcask.pipeline.text.columns import RecordError

Row = tuple[list[int], list[float]]  # ids and log-probabilities of one position
WANTED = "response.choices[].logprobs.content, response.prompt_logprobs or response.meta_info"


class ReadReplies:
    """Reads records of replies, with the tokenizer of the model that gave them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids = ids_by_bytes(tokenizer)

    def __call__(self, record: Mapping[str, Any]) -> Iterator[LabelledText]:
        """Yield a text per choice. Raises RecordError if there are no log-probabilities in the record."""
        reply = record.get("response") or record
        reply = reply.get("body") or reply if isinstance(reply, dict) else {}
        try:
            if reply.get("meta_info"):
                yield _sglang(reply["meta_info"])
                return
            choices = reply.get("choices") or ([reply] if reply.get("logprobs") else [])
            holders = [reply, *choices]
            scored = next((each for each in holders if each.get("prompt_logprobs")), None)
            if scored:
                ids = next((each["prompt_token_ids"] for each in holders if each.get("prompt_token_ids")), None)
                yield _prompt_logprobs(ids, scored["prompt_logprobs"])
                return
            contents = [(choice.get("logprobs") or {}).get("content") for choice in choices]
        except RecordError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RecordError(
                f"is no reply with log-probabilities: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not any(contents):
            raise RecordError(f"has no log-probabilities: must have {WANTED}")
        prompt = self._prompt({**record, **{k: v for k, v in reply.items() if k == "prompt_token_ids"}})
        for content in contents:
            if content:
                yield self._continued(prompt, content)

    def _prompt(self, record: Mapping[str, Any]) -> IntArray:
        if record.get("prompt_token_ids") is not None:
            return integers(record["prompt_token_ids"], "prompt_token_ids", 1)
        if record.get("messages") is not None:
            if not self._tokenizer.chat_template:
                raise RecordError("messages: need a tokenizer with a chat template, which --tokenizer has not")
            try:
                ids = self._tokenizer.apply_chat_template(
                    record["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except Exception as error:  # a template is a program, and may raise anything
                raise RecordError(f"messages: the chat template rejects them: {first_line(error)}") from error
            return np.asarray(ids, dtype=np.int64)
        if isinstance(record.get("prompt"), str):
            return np.asarray(self._tokenizer.encode(record["prompt"]), dtype=np.int64)
        raise RecordError("has no prompt: must have messages, prompt or prompt_token_ids beside the response")

    def _continued(self, prompt: IntArray, content: Sequence[Any]) -> LabelledText:
        """Return the prompt with the tokens of a reply, whose rows stand one token before them."""
        tokens, rows, gold = [], [], []
        for number, position in enumerate(content):
            try:
                token = self._id(position)
                if token is None:
                    raise RecordError(
                        f"token {number} of the reply, {shown(position.get('token'), 30)}, is not in the vocabulary of "
                        "--tokenizer; with vLLM ask for return_tokens_as_token_ids"
                    )
                rows.append(self._row(position))
                gold.append(float(position["logprob"]))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, RecordError):
                    raise
                raise RecordError(f"token {number} of the reply must have token, logprob and top_logprobs") from error
            tokens.append(token)
        ids, values = entries([row[0] for row in rows], [row[1] for row in rows], ("token", "logprob"))
        text = np.concatenate([prompt, np.asarray(tokens, dtype=np.int64)])
        at = len(prompt) - 1 + np.arange(len(tokens))
        return LabelledText(text, np.ones(len(text), dtype=bool), at, ids, values, gold=np.array(gold, np.float32))

    def _row(self, position: Mapping[str, Any]) -> Row:
        """Return the most probable entries, up to the first whose id is unknown.

        vLLM puts the sampled token first; where it is less probable than all others it may be none of the top.
        """
        top = list(position.get("top_logprobs") or [])
        order = [float(entry["logprob"]) for entry in top]
        if len(top) > 1 and order[0] == min(order) < max(order) and top[0]["token"] == position["token"]:
            top = top[1:]
        found: list[int] = []
        values: list[float] = []
        for entry in sorted(top, key=lambda entry: -float(entry["logprob"])):
            token = self._id(entry)
            if token is None or token in found:
                break
            found.append(token)
            values.append(float(entry["logprob"]))
        return found, values

    def _id(self, entry: Mapping[str, Any]) -> int | None:
        text = entry["token"]
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        data = bytes(entry["bytes"]) if entry.get("bytes") is not None else text.encode()
        return self._ids.get(data, self._ids.get(text.encode()))


def ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """Return the id of each token by its bytes; of several with the same bytes a special one comes last."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    inverse = {char: byte for byte, char in bytes_to_unicode().items()}
    byte_level = sum(all(char in inverse for char in token) for token in vocabulary) > len(vocabulary) * 0.99
    ids: dict[bytes, int] = {}
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1] in special, item[1])):
        if index in special:
            data = token.encode()
        elif byte_level:
            data = bytes(inverse[char] for char in token if char in inverse)
        elif len(token) == 6 and token.startswith("<0x"):
            data = bytes([int(token[3:5], 16)])
        else:
            data = token.replace("\u2581", " ").encode()
        ids.setdefault(data, index)
    return ids


def _prompt_logprobs(ids: Any, rows: Sequence[Any]) -> LabelledText:
    """Return vLLM's scored prompt. The first row is null; others may hold the prompt's own token beyond the top."""
    if ids is None:
        raise RecordError("prompt_logprobs: need prompt_token_ids beside them: ask vLLM for return_token_ids")
    text = integers(ids, "prompt_token_ids", 1)
    if len(rows) != len(text):
        raise RecordError(f"prompt_logprobs: must have {len(text)} rows, as there are tokens, got {len(rows)}")
    found, gold = [], []
    for row, own in zip(rows[1:], text[1:].tolist(), strict=True):
        ranked = sorted(row.items(), key=lambda item: int(item[1]["rank"]))
        top = [
            (int(token), float(entry["logprob"]))
            for place, (token, entry) in enumerate(ranked, start=1)
            if entry["rank"] <= place
        ]
        found.append(top)
        gold.append(float(row[str(own)]["logprob"]) if str(own) in row else -np.inf)
    return _scored(text, found, gold)


def _sglang(meta: Mapping[str, Any]) -> LabelledText:
    """Return the tokens and rows of SGLang's ``meta_info``: entries are [log-probability, id, text]."""
    tokens = [*meta["input_token_logprobs"], *(meta.get("output_token_logprobs") or [])]
    tops = [*meta["input_top_logprobs"], *(meta.get("output_top_logprobs") or [])]
    if len(tokens) != len(tops):
        raise RecordError(f"meta_info: has {len(tokens)} tokens and {len(tops)} rows of top_logprobs")
    text = integers([token[1] for token in tokens], "meta_info", 1)
    rows = [[(int(entry[1]), float(entry[0])) for entry in row or ()] for row in tops[1:]]
    return _scored(text, rows, [-np.inf if token[0] is None else float(token[0]) for token in tokens[1:]])


def _scored(text: IntArray, found: list[list[tuple[int, float]]], gold: list[float]) -> LabelledText:
    """Return a text all of whose tokens but the first have a row, which stands one token before."""
    rows = [[[entry[i] for entry in row] for row in found] for i in (0, 1)]
    ids, values = entries(rows[0], rows[1], ("id", "logprob"))
    wanted = np.ones(len(text), dtype=bool)
    return LabelledText(text, wanted, np.arange(len(text) - 1), ids, values, gold=np.array(gold, dtype=np.float32))
