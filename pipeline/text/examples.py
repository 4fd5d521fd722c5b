"""Examples: from JSONL files, Parquet files or hub datasets to token ids and target masks.

A record is one of {"prompt", "response"}, {"messages": [{"role", "content"}, ...]} or {"text"}. It is cut into segments
of text, each a target or not. Segments are encoded separately, so that the boundary between prompt and response falls
where it falls when the student generates. Position t is a target position if token t + 1 belongs to a target.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.cache.labels import IntArray
from logitcask.pipeline.console import track

KINDS = {"prompt": ("prompt", "response"), "messages": ("messages",), "text": ("text",)}
OPTIONAL = {"category", "id", "language"}
Segment = tuple[str, bool]  # text, whether its tokens are targets


@dataclass(frozen=True)
class Encoded:
    """Token ids (L,) and the target mask (L,), before truncation."""

    input_ids: IntArray
    target_mask: NDArray[np.bool_]


def read_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record with its location, from a .jsonl or .parquet file or a hub dataset's train split.

    Raises LogitcaskError if the file is missing, empty or damaged, or a line is not a JSON object.
    """
    empty = True
    for where, record in _parse(source):
        empty = False
        yield where, record
    if empty:
        raise LogitcaskError(f"{source}: has no examples: it must hold at least one record")


def _parse(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        yield from _parquet_records(source)
    elif path.is_file():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{source}:{number}", _parse_line(f"{source}:{number}", line)
    elif path.suffix in {".jsonl", ".json", ".parquet"} or path.exists():
        raise LogitcaskError(f"{source}: no such data file: give a .jsonl or .parquet file or a dataset's hub id")
    else:
        yield from _hub_records(source)


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LogitcaskError(f"{where}: malformed JSON: {error}: each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise LogitcaskError(f"{where}: must be a JSON object, got {type(record).__name__}")
    return record


def _parquet_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{source}: row {number}", {key: value for key, value in record.items() if value is not None}
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # damaged files raise any of these
        reason = first_line(error)
        raise LogitcaskError(f"{source}: damaged or not a Parquet file, after row {number}: {reason}") from error


def _hub_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        records = datasets.load_dataset(source, split="train", streaming=True)
        for number, record in enumerate(records, start=1):
            yield f"{source}: row {number}", {key: value for key, value in record.items() if value is not None}
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise LogitcaskError(f"{source}: neither a file nor a dataset that could be loaded: {reason}") from error


def record_kind(where: str, record: dict[str, Any]) -> str:
    """Return ``prompt``, ``messages`` or ``text``. Raises LogitcaskError if fields are missing, unknown or mistyped."""
    kind = next((name for name in KINDS if name in record), None)
    if kind is None:
        raise LogitcaskError(
            f"{where}: unknown columns {sorted(record)}: needs prompt and response, or messages, or text"
        )
    unknown = sorted(record.keys() - set(KINDS[kind]) - OPTIONAL)
    if unknown:
        raise LogitcaskError(f"{where}: unknown columns {unknown} beside {', '.join(KINDS[kind])}: remove them")
    for name in KINDS[kind]:
        if name not in record:
            raise LogitcaskError(f"{where}: field {name!r} is missing")
        expected = list if name == "messages" else str
        if not isinstance(record[name], expected):
            type_name = "a list" if expected is list else "a string"
            raise LogitcaskError(f"{where}: field {name!r} must be {type_name}, got {type(record[name]).__name__}")
    return kind


class Encoder:
    """Encodes records as token ids and target masks, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prompt_loss: bool) -> None:
        self._tokenizer, self._prompt_loss = tokenizer, prompt_loss
        empty = tokenizer("").input_ids
        self._begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id in empty else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # SentencePiece tokenizers put a blank before a text (some: unless it has one); a continuation must not get one.
        self._joins = self._ids("a b") == self._ids("a") + self._ids(" b") and self._ids("b") != self._ids(" b")
        self._sentinel = [] if self._joins else self._ids("\n")

    def encode(self, where: str, record: dict[str, Any]) -> Encoded:
        """Return a record's token ids and target mask, (L,) each. Raises LogitcaskError if it has no target."""
        kind = record_kind(where, record)
        if kind == "text":
            ids, is_target = self._encode([(record["text"], True)], self._begin, self._end)
        elif kind == "prompt" and not self._tokenizer.chat_template:
            _require_text(where, "response", record["response"])
            segments = [(record["prompt"], False), (record["response"], True)]
            ids, is_target = self._encode(segments, self._begin, self._end)
        else:
            messages = _messages(where, record) if kind == "messages" else _as_chat(where, record)
            ids, is_target = self._encode(self._chat_segments(where, messages), [], [])
        mask = np.zeros(len(ids), dtype=bool)
        mask[:-1] = True if self._prompt_loss else is_target[1:]
        if not mask.any():
            raise LogitcaskError(f"{where}: has no target: the text after its first token is empty")
        return Encoded(ids, mask)

    def _encode(self, segments: list[Segment], begin: list[int], end: list[int]) -> tuple[IntArray, NDArray[np.bool_]]:
        """Return the token ids (L,) of all segments, and whether each belongs to a target, (L,)."""
        ids, is_target = list(begin), [False] * len(begin)
        for text, targeted in segments:
            segment_ids = self._ids(text) if self._joins or len(ids) == len(begin) else self._continued(text)
            ids += segment_ids
            is_target += [targeted] * len(segment_ids)
        ids += end
        is_target += [True] * len(end)
        return np.array(ids, dtype=np.int64), np.array(is_target, dtype=bool)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _continued(self, text: str) -> list[int]:
        """Return the ids of a text that continues another: encoded after a sentinel, which is cut off."""
        whole, begin = self._ids("\n" + text), self._sentinel
        return whole[len(begin) :] if whole[: len(begin)] == begin else self._ids(text)

    def _chat_segments(self, where: str, messages: list[dict[str, Any]]) -> list[Segment]:
        """Render a chat and cut it at the boundaries of assistant turns; white space after a turn is not a target."""
        render: Callable[..., str] = self._tokenizer.apply_chat_template
        if not self._tokenizer.chat_template:
            raise LogitcaskError(f"{where}: is a chat, but the tokenizer has no chat template: use prompt and response")
        segments: list[Segment] = []
        done = 0
        try:
            whole = render(messages, tokenize=False)
            for place, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = render(messages[:place], tokenize=False, add_generation_prompt=True)
                after = render(messages[: place + 1], tokenize=False)
                end = len(after.rstrip())
                if not (after.startswith(before) and whole.startswith(after[:end]) and len(before) >= done):
                    raise LogitcaskError(
                        f"{where}: the chat template rewrites earlier turns, so turn {place + 1} cannot be located: "
                        "split the chat into one example per turn"
                    )
                segments += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
                done = end
        except LogitcaskError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise LogitcaskError(f"{where}: the chat template rejects this chat: {error}") from error
        if not segments:
            raise LogitcaskError(f"{where}: has no target: the chat has no assistant turn")
        return [*segments, (whole[done:], False)]


def encode_source(encoder: Encoder, source: str) -> Iterator[Encoded]:
    """Yield every record of a source, encoded, under a progress bar."""
    with track(f"reading {source}", None, "examples") as advance:
        for where, record in read_records(source):
            yield encoder.encode(where, record)
            advance(1)


def _require_text(where: str, field: str, text: str) -> None:
    if not text.strip():
        raise LogitcaskError(f"{where}: field {field!r} is empty: a response needs text")


def _as_chat(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    _require_text(where, "response", record["response"])
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]


def _messages(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = record["messages"]
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise LogitcaskError(f"{where}: message {number} must be an object with the strings role and content")
        if message["role"] == "assistant":
            _require_text(where, f"messages[{number - 1}].content", message["content"])
    return messages
