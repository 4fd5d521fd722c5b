"""Messages: what they say of themselves, and the forms that templates expect of them."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]
Change = Callable[[Any], Any]

THINK, END_THINK = "<think>", "</think>"
ABSENT = object()  # content of a message that has no such key
NOT_TRAINED = {"weight": 0, "train": False, "loss_mask": 0}  # a message's own word that it is no target


def is_trained(message: Message) -> bool:
    """Return whether a message may be a target, by its own ``weight``, ``train`` or ``loss_mask``."""
    return all(message.get(name) is None or bool(message[name]) for name in NOT_TRAINED)


def forms(messages: Sequence[Message]) -> Iterator[Iterator[list[Message]]]:
    """Yield the forms that templates expect of content and tool calls, beginning with the messages as they are.

    Arguments that are JSON text, as OpenAI has them, are objects first: most templates write JSON themselves. Forms
    that have the contents in common come together.
    """
    contents: list[Change] = [lambda content: content]
    if any(isinstance(message.get("content"), list) for message in messages):
        contents.append(_joined)
    contents.append(_as_parts)
    empty: list[Change] = [lambda content: ABSENT if content is None else content]
    if any(message.get("content") in (None, "") for message in messages):
        # no key, as transformers has it; some templates print None, others ask for it
        empty += [lambda content: content or "", lambda content: content or None]
    arguments: list[Change] = [lambda value: value]
    if any(message.get("tool_calls") for message in messages):
        arguments = [_as_object, lambda value: value, _as_text]
    apart = [_reasoning_apart(message) for message in messages]
    for form in [list(messages)] if apart == list(messages) else [list(messages), apart]:
        for content in contents:
            yield _each_form(form, content, empty, arguments)


def _each_form(
    messages: list[Message], content: Change, empty: list[Change], arguments: list[Change]
) -> Iterator[list[Message]]:
    for blank, argument in itertools.product(empty, arguments):
        yield [_with(message, content, blank, argument) for message in messages]


def _reasoning_apart(message: Message) -> Message:
    """Return an assistant's message with the reasoning that its content begins with in a field of its own."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or END_THINK not in content:
        return message
    reasoning, answer = content.split(END_THINK, maxsplit=1)
    return {**message, "content": answer.lstrip("\n"), "reasoning_content": reasoning.replace(THINK, "", 1).strip("\n")}


def _joined(content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return "".join(part["text"] for part in content)
    return content


def _as_parts(content: Any) -> Any:
    joined = _joined(content)
    return [{"type": "text", "text": joined}] if isinstance(joined, str) else content


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_object(value: Any) -> Any:
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _with(message: Message, content: Change, blank: Change, arguments: Change) -> Message:
    changed = {key: value for key, value in message.items() if key not in NOT_TRAINED}
    changed["content"] = content(blank(message.get("content")))
    if changed["content"] is ABSENT:
        del changed["content"]
    if message.get("tool_calls"):
        changed["tool_calls"] = [_with_arguments(call, arguments) for call in message["tool_calls"]]
    return changed


def _with_arguments(call: Any, arguments: Change) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": arguments(function["arguments"])}}


def with_mark(message: Message, mark: str) -> Message:
    """Return a message with a mark at the end of its text, the same message if it has none."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return {**message, "content": content + mark}
    if isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]}
    return message


def called_names(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]
