"""Records of the shapes that public data sets have, brought to one of four kinds.

The first of these that fits, by the columns that are there and not null:

    input_ids with labels or target_mask            tokens, ready made
    messages, or conversations (ShareGPT)           a chat
    prompt with response or completion              a prompt and its response; lists of messages are a chat
    instruction, input, output (Alpaca)             a prompt and its response
    text                                            a text, all of it a target

A ``system`` column is the first message. Columns that are not used are named once; ``category`` and ``language`` are
kept.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import shown
from logitcask.cache.manifest import NO_CONTROLS, Metadata
from logitcask.pipeline.console import say

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"},
    **{"function_call": "assistant", "observation": "tool", "function_response": "tool"},
}
KEPT = {"category", "language"}
SHAPES: tuple[tuple[str, ...], ...] = (
    ("input_ids", "labels"),
    ("input_ids", "target_mask"),
    ("messages",),
    ("conversations",),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
OPTIONAL = {
    "input_ids": ("position_ids", "seq_lengths"),
    "messages": ("tools", "system"),
    "conversations": ("tools", "system"),
    "prompt": ("tools", "system"),
    "instruction": ("input", "system"),
}
READ = {"role", "content", "name", "reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id"}
SOFT_LABELS = {"token_ids", "logprobs"}
FLAGS = ("weight", "train", "loss_mask")  # a message's own word whether it is a target
MEANINGFUL = re.compile("weight|loss|mask|train|target|label|ignore|skip", re.IGNORECASE)
MOST_VALUES, LONGEST_VALUE = 1_000, 100
MOST_JSON = 1 << 18  # bytes of a column's values in the manifest, whose document is bounded
Codes = dict[str, NDArray[np.uint16]]
WANTED = "messages, conversations, prompt and response, instruction and output, text, or input_ids and labels"


class RecordError(ValueError):
    """A record that cannot be used: the message is the reason; ``value`` is what there is of it, if it is no record."""

    def __init__(self, reason: str, value: Any = None) -> None:
        super().__init__(reason)
        self.value = value


@dataclass(frozen=True)
class Record:
    """A record of one kind: ``tokens``, ``chat``, ``prompt`` or ``text``; the others' fields are empty."""

    kind: str
    text: str = ""  # of kind text
    prompt: str = ""
    response: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    tokens: Mapping[str, Any] | None = None  # input_ids, and labels or target_mask, and perhaps the rows' borders
    unused: frozenset[str] = frozenset()  # columns


def metadata_of(raw: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the record's ``category`` and ``language``, as text, where it has them."""
    named = {renamed.get(name, name): value for name, value in raw.items()}
    return {name: str(named[name]) for name in sorted(KEPT & named.keys()) if named[name] not in (None, "", [], {})}


def shape_record(raw: Mapping[str, Any], renamed: Mapping[str, str]) -> Record:
    """Return a record from its columns; ``renamed`` gives our names of the user's columns.

    Raises RecordError if no shape fits, a field is empty or of the wrong type, or a text is not valid Unicode.
    """
    columns = {renamed.get(name, name): value for name, value in raw.items() if value is not None}
    shape = next((shape for shape in SHAPES if columns.keys() >= set(shape)), None)
    if shape is None:
        nulls = sorted(renamed.get(name, name) for name, value in raw.items() if value is None)
        raise RecordError(f"has columns {sorted(columns)}{f', null: {nulls}' if nulls else ''}; needs {WANTED}")
    used = {*shape, *OPTIONAL.get(shape[0], ())}
    unused = frozenset(columns.keys() - used - KEPT)
    if shape[0] == "input_ids":
        if "target_mask" in shape and columns.keys() >= SOFT_LABELS:
            raise RecordError(
                "target_mask among soft labels (token_ids, logprobs) marks the positions before targets: give labels, "
                "-100 off targets, or bring in the soft labels with cache import"
            )
        return Record("tokens", tokens={name: columns[name] for name in used & columns.keys()}, unused=unused)
    if shape == ("text",):
        return Record("text", text=_text(columns, "text"), unused=unused)
    tools = _list(columns, "tools") if "tools" in columns else []
    if shape[0] in ("messages", "conversations"):
        return _chat(columns, _list(columns, shape[0]), tools, unused)
    if isinstance(columns[shape[0]], list):
        return _chat(columns, [message for name in shape for message in _list(columns, name)], tools, unused)
    prompt, response = (_text(columns, name) for name in shape)
    if not response.strip():
        raise RecordError(f"{shape[1]} is empty: a response needs text")
    if more := columns.get("input") if shape[0] == "instruction" else None:
        prompt = f"{prompt}\n\n{_text({'input': more}, 'input')}"
    if columns.get("system"):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return Record("chat", messages=_with_system(columns, turns), tools=tuple(tools), unused=unused)
    return Record("prompt", prompt=prompt, response=response, tools=tuple(tools), unused=unused)


def _chat(columns: Mapping[str, Any], raw: list[Any], tools: list[Any], unused: frozenset[str]) -> Record:
    messages = [_message(number, message) for number, message in enumerate(raw, start=1)]
    strange = {f"messages.{key}" for message in messages for key in message.keys() - READ - set(FLAGS)}
    kept = [{key: value for key, value in message.items() if key in {*READ, *FLAGS}} for message in messages]
    return Record("chat", messages=_with_system(columns, kept), tools=tuple(tools), unused=unused | strange)


def _text(columns: Mapping[str, Any], name: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise RecordError(f"{name} must be a string, got {type(value).__name__}")
    return _valid(name, value)


def _valid(name: str, text: str) -> str:
    if "\0" in text:
        raise RecordError(f"{name} contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{name} holds half a surrogate pair, at character {error.start}") from error
    return text


def _require_valid(name: str, value: Any) -> None:
    """Raise RecordError if a string in a JSON value is not valid."""
    if isinstance(value, str):
        _valid(name, value)
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _require_valid(name, item)


def _parsed(value: Any) -> Any:
    """Return the value of JSON text: data sets hold tools so, whose arguments have no schema in common."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _list(columns: Mapping[str, Any], name: str) -> list[Any]:
    value = _parsed(columns[name]) if name == "tools" else columns[name]
    if not isinstance(value, list) or (name != "tools" and not value):
        raise RecordError(f"{name} must be a list that is not empty, got {type(value).__name__}")
    _require_valid(name, value if name == "tools" else [])
    return value


def _with_system(columns: Mapping[str, Any], messages: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    if not columns.get("system") or (messages and messages[0]["role"] == "system"):
        return tuple(messages)
    return ({"role": "system", "content": _text(columns, "system")}, *messages)


def _message(number: int, raw: Any) -> dict[str, Any]:
    """Return a message with ``role`` and ``content``, of ShareGPT's ``from`` and ``value`` too; nulls are left out."""
    if not isinstance(raw, dict):
        raise RecordError(f"a message must be an object, got {type(raw).__name__}")
    names = {"from": "role", "value": "content"}
    message = {names.get(str(key), str(key)): value for key, value in raw.items()}
    message["tool_calls"] = _parsed(message.get("tool_calls")) or None
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RecordError("a message must have a role that is a string")
    message["role"] = ROLES.get(role.lower(), role)
    if role.lower() == "function_call" and "tool_calls" not in message:
        content, message = None, _called(message)
    for key in message.keys() & READ - {"content"}:
        _require_valid(key, message[key])
    if isinstance(content, str):
        _valid("content", content)
    elif isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise RecordError("content must be a string or a list of text parts: only text is supported")
            _valid("content", part["text"])
    elif content is not None or not message.get("tool_calls"):
        raise RecordError(f"content must be a string or a list of text parts, got {type(content).__name__}")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RecordError(f"tool_calls of message {number} must be a list of objects")
    _require_flags(number, message)
    spoken = content or message.get("tool_calls") or message.get("reasoning_content")
    if message["role"] == "assistant" and not (spoken.strip() if isinstance(spoken, str) else spoken):
        raise RecordError("an assistant message is empty: it needs text or tool calls")
    return message


def _called(message: dict[str, Any]) -> dict[str, Any]:
    """Return ShareGPT's message of one or more calls as one with ``tool_calls``."""
    calls = _parsed(message.get("content"))
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RecordError("a function_call must be JSON with name and arguments")
    return {**message, "content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _require_flags(number: int, message: Mapping[str, Any]) -> None:
    """Raise RecordError if a message says something of its being a target that is not understood."""
    for key, value in message.items():
        if key in FLAGS and value not in (0, 1):
            raise RecordError(f"{key} of message {number} must be 0 or 1, got {value!r}")
        if key in FLAGS and value and message["role"] != "assistant":
            raise RecordError(
                f"message {number} has {key} {value!r} and role {message['role']!r}: only an assistant can be a target"
            )
        if key not in FLAGS and key not in READ and MEANINGFUL.search(key):
            raise RecordError(f"{key} of message {number} is not understood: known are {', '.join(FLAGS)}")


class MetadataColumns:
    """Collects the values of examples as they come. Memory: 2 bytes per example and column."""

    def __init__(self) -> None:
        self._codes: dict[str, array[int]] = {}
        self._values: dict[str, dict[str, int]] = {}  # the codes of values, in the order met
        self._refused: set[str] = set()

    def add(self, index: int, metadata: Mapping[str, str]) -> None:
        """Take the values of the example at ``index``; those left out since the last have none."""
        for name in metadata.keys() - self._refused:
            value = metadata[name]
            values, codes = self._values.setdefault(name, {}), self._codes.setdefault(name, array("H"))
            codes.extend([0] * (index - len(codes)))
            if value not in values and (len(values) == MOST_VALUES or not _fits(value)):
                self._refuse(name, f"{shown(value)} is one more than {MOST_VALUES:,}" if _fits(value) else shown(value))
                continue
            codes.append(values.setdefault(value, len(values) + 1))

    def settle(self, examples: int) -> tuple[Metadata | None, Codes]:
        """Return the values, sorted, and the codes (E,) of each column; None and nothing if there is no column."""
        for name in [name for name, values in self._values.items() if len(json.dumps(list(values))) > MOST_JSON]:
            self._refuse(name, "all together they are too long")
        codes: Codes = {}
        for name in sorted(self._codes):
            self._codes[name].extend([0] * (examples - len(self._codes[name])))
            ordered = sorted(self._values[name])
            places = np.zeros(len(ordered) + 1, dtype=np.uint16)
            for place, value in enumerate(ordered, start=1):
                places[self._values[name][value]] = place
            codes[name] = places[np.frombuffer(self._codes[name], dtype=np.uint16)]
        if not codes:
            return None, {}
        digest = hashlib.sha256()
        for name in codes:
            digest.update(codes[name].astype("<u2").tobytes())
        values = {name: sorted(self._values[name]) for name in codes}
        return Metadata.model_validate({"values": values, "fingerprint": digest.hexdigest()}), codes

    def _refuse(self, name: str, reason: str) -> None:
        self._refused.add(name)
        del self._values[name], self._codes[name]
        say(
            f"column {name!r} is not kept in the cache: it may have {MOST_VALUES:,} values, of {LONGEST_VALUE} "
            f"printable characters: {reason}"
        )


def _fits(value: str) -> bool:
    surrogate = any("\ud800" <= character <= "\udfff" for character in value)
    return len(value) <= LONGEST_VALUE and not surrogate and re.fullmatch(NO_CONTROLS, value) is not None
