"""Examples: from JSONL files, Parquet files or hub datasets to token ids and target masks.

A record is one of {"prompt", "response"}, {"messages": [{"role", "content"}, ...]} or {"text"}. It is cut into segments
of text, each a target or not. Segments are encoded separately, so that the boundary between prompt and response falls
where it falls when the student generates. Position t is a target position if token t + 1 belongs to a target. Begin and
end tokens that a text already has are not added again.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from logitcask.cache.errors import LogitcaskError, first_line, shown
from logitcask.cache.labels import IntArray
from logitcask.pipeline.console import say, track

KINDS = {"prompt": ("prompt", "response"), "messages": ("messages",), "text": ("text",)}
OPTIONAL = {"category", "id", "language"}
MARK = "zqx{}xqz"  # put after a turn's content, to see whether the template renders it
Segment = tuple[str, bool]  # text, whether its tokens are targets
Part = tuple[list[int], bool]  # its tokens


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
    if b"\\u" in line:
        _require_whole_characters(where, record)
    return record


def _require_whole_characters(where: str, record: dict[str, Any]) -> None:
    """Raise LogitcaskError if a text holds half a surrogate pair, which JSON can spell but no tokenizer can encode."""
    for name, value in record.items():
        text = json.dumps([name, value], ensure_ascii=False)
        if text != text.encode(errors="replace").decode():
            raise LogitcaskError(f"{where}: field {shown(name)} holds half a surrogate pair: remove or replace it")


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
    """Encodes records as token ids and target masks, with one tokenizer.

    A chat template that writes the date writes that of ``day``, today by default, at midnight.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, prompt_loss: bool, day: datetime.date | None = None
    ) -> None:
        self._tokenizer, self._prompt_loss = tokenizer, prompt_loss
        self._day = day or datetime.date.today()
        self.date: str | None = None  # the day that a template wrote, YYYY-MM-DD; None if it wrote none
        empty = tokenizer("").input_ids
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._begin = self._bos if tokenizer.bos_token_id in empty else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # SentencePiece tokenizers put a blank before a text (some: unless it has one); a continuation must not get one.
        self._joins = self._ids("a b") == self._ids("a") + self._ids(" b") and self._ids("b") != self._ids(" b")
        self._sentinel = [] if self._joins else self._ids("\n")

    def encode(self, where: str, record: dict[str, Any]) -> Encoded:
        """Return a record's token ids and target mask, (L,) each. Raises LogitcaskError if it has no target."""
        kind = record_kind(where, record)
        if kind == "text":
            parts = self._closed([(record["text"], True)])
        elif kind == "prompt" and not self._tokenizer.chat_template:
            _require_text(where, "response", record["response"])
            parts = self._closed([(record["prompt"], self._prompt_loss), (record["response"], True)])
        else:
            messages = _messages(where, record) if kind == "messages" else _as_chat(where, record)
            parts = self._encode(self._chat_segments(where, *self._weighed(where, messages)))
        ids = np.array([token for part, _ in parts for token in part], dtype=np.int64)
        mask = np.zeros(len(ids), dtype=bool)
        mask[:-1] = [targeted for part, targeted in parts for _ in part][1:]
        if not mask.any():
            raise LogitcaskError(f"{where}: has no target: the text after its first token is empty")
        return Encoded(ids, mask)

    def _closed(self, segments: list[Segment]) -> list[Part]:
        """Return the parts of what no template rendered, with one begin and one end token.

        White space after an end token of the text's own is no target.
        """
        text = segments[-1][0]
        kept = text.rstrip() if self._ends(text) else text
        parts = self._encode([*segments[:-1], (kept, True), (text[len(kept) :], self._prompt_loss)])
        last = parts[-2][0]
        parts[-2] = (last if last[-1:] == self._end else last + self._end, True)
        first = next((part for part, _ in parts if part), [])
        return parts if first[:1] == self._begin else [(self._begin, False), *parts]

    def _encode(self, segments: list[Segment]) -> list[Part]:
        """Return the token ids of each segment, with no begin or end token twice in a row at its ends."""
        parts: list[Part] = []
        started = False
        for text, targeted in segments:
            ids = self._continued(text) if started and not self._joins else self._ids(text)
            while self._bos and not started and ids[:2] == self._bos * 2:
                ids = ids[1:]
            while self._end and ids[-2:] == self._end * 2:
                ids = ids[:-1]
            parts.append((ids, targeted))
            started = started or bool(ids)
        return parts

    def _ends(self, text: str) -> bool:
        """Return whether a text ends with the end token's string, before white space."""
        return bool(self._end) and text.rstrip().endswith(self._tokenizer.eos_token)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _continued(self, text: str) -> list[int]:
        """Return the ids of a text that continues another: encoded after a sentinel, which is cut off."""
        whole, begin = self._ids("\n" + text), self._sentinel
        return whole[len(begin) :] if whole[: len(begin)] == begin else self._ids(text)

    def _weighed(self, where: str, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[bool]]:
        """Return the turns without their weights, and whether each is a target."""
        turns, targets = [], []
        for number, message in enumerate(messages, start=1):
            answers = message["role"] == "assistant"
            weight = message.get("weight", answers or self._prompt_loss)
            if weight not in (0, 1):
                raise LogitcaskError(f"{where}: weight of message {number} must be 0 or 1, got {shown(weight)}")
            if not answers and weight != self._prompt_loss:
                raise LogitcaskError(
                    f"{where}: message {number} has weight {weight} and role {message['role']!r}: only the weight of "
                    "an assistant turn can be set: leave it out"
                )
            content = message["content"].rstrip() if answers and self._ends(message["content"]) else message["content"]
            turns.append({**{key: message[key] for key in message.keys() - {"weight"}}, "content": content})
            targets.append(bool(weight))
        return turns, targets

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Apply the chat template with the encoder's day as its clock, which transformers does not let callers pass."""
        template = self._tokenizer.get_chat_template(tools=options.get("tools"))
        known = _compile_jinja_template(template).environment.globals  # of this template alone
        clock, known["strftime_now"] = known["strftime_now"], self._strftime
        try:
            return str(self._tokenizer.apply_chat_template(messages, **options))
        finally:
            known["strftime_now"] = clock

    def _strftime(self, form: str) -> str:
        if self.date is None:
            self.date = self._day.isoformat()
            say(f"the chat template writes the date into the examples: {self.date}")
        return datetime.datetime.combine(self._day, datetime.time()).strftime(form)

    def _chat_segments(self, where: str, messages: list[dict[str, Any]], targets: list[bool]) -> list[Segment]:
        """Render a chat and cut it at the boundaries of assistant turns; white space after a turn is not a target."""
        render = self._render
        if not self._tokenizer.chat_template:
            raise LogitcaskError(f"{where}: is a chat, but the tokenizer has no chat template: use prompt and response")
        segments: list[Segment] = []
        done = 0
        try:
            whole = render(messages, tokenize=False)
            _require_rendered(where, messages, render)
            for place, (message, targeted) in enumerate(zip(messages, targets, strict=True)):
                if message["role"] != "assistant" or not (targeted or self._prompt_loss):
                    continue
                before = render(messages[:place], tokenize=False, add_generation_prompt=True)
                after = render(messages[: place + 1], tokenize=False)
                end = len(after.rstrip())
                if not (after.startswith(before) and whole.startswith(after[:end]) and len(before) >= done):
                    raise LogitcaskError(
                        f"{where}: the chat template rewrites earlier turns, so turn {place + 1} cannot be located: "
                        "split the chat into one example per turn"
                    )
                segments += [(whole[done : len(before)], self._prompt_loss), (whole[len(before) : end], targeted)]
                done = end
        except LogitcaskError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise LogitcaskError(f"{where}: the chat template rejects this chat: {error}") from error
        if not segments:
            raise LogitcaskError(f"{where}: has no target: the chat has no assistant turn, or none of weight 1")
        return [*segments, (whole[done:], self._prompt_loss)]


def encode_sources(encoder: Encoder, sources: tuple[str, ...]) -> Iterator[Encoded]:
    """Yield every record of every source, in order, encoded, under a progress bar for each source."""
    for source in sources:
        with track(f"reading {source}", None, "examples") as advance:
            for where, record in read_records(source):
                yield encoder.encode(where, record)
                advance(1)


def _require_rendered(where: str, messages: list[dict[str, Any]], render: Callable[..., str]) -> None:
    """Raise LogitcaskError if the template ignores the content of a turn, or a key beside role and content."""
    marked = [
        {**message, "content": message["content"] + MARK.format(number)} if message["content"].strip() else message
        for number, message in enumerate(messages, start=1)
    ]
    rendered = render(marked, tokenize=False)
    for number, message in enumerate(messages, start=1):
        if message["content"].strip() and MARK.format(number) not in rendered:
            raise LogitcaskError(
                f"{where}: the chat template drops message {number}, of role {message['role']!r}: remove it, or use a "
                "model whose template renders that role"
            )
        before = messages[: number - 1]
        for key in sorted(message.keys() - {"role", "content"}):
            without = {name: value for name, value in message.items() if name != key}
            if render([*before, message], tokenize=False) == render([*before, without], tokenize=False):
                raise LogitcaskError(f"{where}: the chat template ignores {key!r} of message {number}: remove it")


def _require_text(where: str, field: str, text: str) -> None:
    if not text.strip():
        raise LogitcaskError(f"{where}: field {field!r} is empty: a response needs text")


def _as_chat(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    _require_text(where, "response", record["response"])
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]


def _messages(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[Any] = record["messages"]
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise LogitcaskError(f"{where}: message {number} must be an object with the strings role and content")
        if message["role"] == "assistant":
            _require_text(where, f"messages[{number - 1}].content", message["content"])
    # Parquet gives every turn the keys that any turn has
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
