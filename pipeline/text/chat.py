"""Chats to segments of text: what the model sees, and what of it the model itself would have written.

A chat template is a program that renders messages to text. The target of an assistant turn is what the model would
generate there: everything after the generation prompt, up to and including the end of the turn. If the turns of a chat,
rendered one by one, are prefixes of the whole chat, the chat is one example. If the template rewrites earlier turns
(drops their reasoning, opens ``<think>`` in the generation prompt), each turn is an example of its own, as the model
would see it.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from logitcask.cache.errors import first_line

Message = dict[str, Any]
Segment = tuple[str, bool | None]  # text, and whether its tokens are targets; None: never, whatever the settings
Marked = Callable[..., tuple[str, list[tuple[int, int]]]]  # the same, with the places of its {% generation %} blocks
Change = Callable[[Any], Any]
Render = Callable[..., str]  # apply_chat_template(messages, tools=, tokenize=False, add_generation_prompt=, ...)

THINK, END_THINK = "<think>", "</think>"
MARK = "zqx{}xqz"  # put after a message's text, to see whether the template renders it
NOT_TRAINED = {"weight": 0, "train": False, "loss_mask": 0}  # a message's own word that it is no target
READ = {
    "role",
    "content",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_calls",
    "tool_call_id",
    *NOT_TRAINED,
}


class ChatError(ValueError):
    """A chat that the template cannot render, or renders so that no target can be told apart."""


def chat_examples(
    render: Render, messages: Sequence[Message], tools: Sequence[Any] | None = None, turns: str = "auto", eos: str = ""
) -> list[list[Segment]]:
    """Return the examples of a chat, each a list of segments.

    ``turns``: ``auto`` makes one example if borders hold, else one per assistant turn; ``all`` one, or an error;
    ``each`` one per turn; ``last`` that of the last assistant turn alone. Raises ChatError with the reason.
    """
    reasons = []
    for form in _forms(messages):
        chat = _Chat(render, form, tools, [is_trained(message) for message in messages], eos)
        try:
            return chat.examples(turns)
        except ChatError as error:
            reasons.append(str(error))
        except Exception as error:  # a template is a program of its own and raises what it likes
            reasons.append(f"the chat template refuses it: {first_line(error)}")
    raise ChatError(reasons[0])


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the messages as they are, then in the other forms that templates expect of content and tool calls."""
    contents: list[Change] = [lambda content: content]
    if any(isinstance(message.get("content"), list) for message in messages):
        contents.append(_joined)
    contents.append(lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content)
    empty: list[Change] = [lambda content: content]
    if any(
        message.get("content") in (None, "") for message in messages
    ):  # some templates print None, others ask for it
        empty = [lambda content: content or "", lambda content: content or None]
    arguments: list[Change] = [lambda value: value]
    if any(message.get("tool_calls") for message in messages):
        arguments += [_as_text, _as_object]
    yield from _each_form(messages, contents, empty, arguments)
    apart = [_reasoning_apart(message) for message in messages]
    if apart != list(messages):
        yield from _each_form(apart, contents, empty, arguments)


def _each_form(messages: Sequence[Message], *changes: list[Change]) -> Iterator[list[Message]]:
    for content, blank, argument in itertools.product(*changes):
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


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_object(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _with(message: Message, content: Change, blank: Change, arguments: Change) -> Message:
    changed = {key: value for key, value in message.items() if key not in NOT_TRAINED}
    changed["content"] = blank(content(message.get("content")))
    if message.get("tool_calls"):
        changed["tool_calls"] = [_with_arguments(call, arguments) for call in message["tool_calls"]]
    return changed


def _with_arguments(call: Any, arguments: Change) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": arguments(function["arguments"])}}


def is_trained(message: Message) -> bool:
    """Return whether a message may be a target, by its own ``weight``, ``train`` or ``loss_mask``."""
    return all(message.get(name) is None or bool(message[name]) for name in NOT_TRAINED)


class _Chat:
    """One chat in one form."""

    def __init__(
        self, render: Render, messages: list[Message], tools: Sequence[Any] | None, trained: list[bool], eos: str
    ) -> None:
        self._messages, self._tools, self._plain_render, self._trained = messages, tools, render, trained
        self._eos = eos

    def _render(self, messages: list[Message], generation: bool) -> str:
        more: Mapping[str, Any] = {"tools": list(self._tools)} if self._tools else {}
        return self._plain_render(messages, tokenize=False, add_generation_prompt=generation, **more)

    def examples(self, turns: str) -> list[list[Segment]]:
        places = [place for place, message in enumerate(self._messages) if message["role"] == "assistant"]
        places = places[-1:] if turns == "last" else places
        if not any(self._trained[place] for place in places):
            raise ChatError("has no target: the chat has no assistant turn, or none of weight 1")
        self._require_all_messages(places[-1] + 1)
        cut = {place: self._turn(place) for place in places}
        for place, (_, target) in cut.items():
            if any(name not in target for name in _called(self._messages[place])):
                raise ChatError("the chat template drops tool calls")
            if 0 <= target.find(END_THINK) < target.find(THINK):
                raise ChatError("the chat template puts the reasoning of an answer after reasoning of its own")
        whole = self._as_one(cut) if turns in ("auto", "all") else None
        if whole is None and turns == "all":
            raise ChatError("the chat template rewrites earlier turns, so the chat cannot be one example")
        if whole is not None:
            return [whole]
        return [[(prompt, False), (text, True)] for place, (prompt, text) in cut.items() if self._trained[place]]

    def _turn(self, place: int) -> tuple[str, str]:
        """Return the text that the model sees before an assistant turn, and what it writes there."""
        after = self._ended(place, self._render(self._messages[: place + 1], False).rstrip())
        before = self._render(self._messages[:place], True) if place else self._first_prompt(after)
        if after.startswith(before):
            return before, after[len(before) :]
        border = self._common_border(before, after)
        reasoned = self._with_reasoning(self._messages[place], before, after[border:])
        return (before, reasoned) if reasoned is not None else (after[:border], after[border:])

    def _ended(self, place: int, after: str) -> str:
        """Return a rendering up to the end of its last turn, without an EOS that only ends the whole chat."""
        turn = after.removesuffix(self._eos).rstrip()
        if turn == after:
            return after
        try:
            followed = self._render([*self._messages[: place + 1], {"role": "user", "content": "?"}], False)
        except Exception:  # the template does not let a user follow
            return after
        return turn if followed.startswith(turn) and not followed.startswith(after) else after

    def _first_prompt(self, after: str) -> str:
        """Return what comes before the text of a chat that an assistant begins: up to its generation prompt."""
        probe: list[Message] = [{"role": "user", "content": "?"}]
        asked, plain = self._render(probe, True), self._render(probe, False)
        prompt = asked[_common(asked, plain) :]
        while prompt and prompt not in after:  # a rendering need not go through the whole of it
            prompt = prompt[: _snap(prompt, len(prompt) - 1)]
        if not prompt:
            raise ChatError("the chat template cannot begin with an assistant turn")
        return after[: after.index(prompt) + len(prompt)]

    @staticmethod
    def _common_border(before: str, after: str) -> int:
        """Return where an answer begins in a rendering that does not go through the whole generation prompt."""
        common = _snap(before, _common(before, after))
        if not common:
            raise ChatError("the chat template renders a turn otherwise than after its own generation prompt")
        return common

    @staticmethod
    def _with_reasoning(message: Message, before: str, rendered: str) -> str | None:
        """Return what the model writes after a generation prompt that opens reasoning, if the template drops it."""
        if not before.rstrip().endswith(THINK):
            return None
        content = str(message.get("content") or "")
        reasoning = next((message[n] for n in ("reasoning_content", "reasoning", "thinking") if message.get(n)), None)
        answer = content.rsplit(END_THINK, maxsplit=1)[-1]
        if reasoning is None and END_THINK in content:
            reasoning = content.split(END_THINK, maxsplit=1)[0].rsplit(THINK, maxsplit=1)[-1].lstrip("\n")
        else:
            answer = f"\n\n{answer}"
        place = rendered.find(answer.strip())
        if reasoning is None or place < 0:
            return None
        end = rendered[place + len(answer.strip()) :]
        return f"{reasoning.rstrip()}\n{END_THINK}{answer.rstrip()}{end}"

    def _as_one(self, cut: Mapping[int, tuple[str, str]]) -> list[Segment] | None:
        """Return the whole chat as one example, None if its turns are not rendered as each alone."""
        whole = self._render(self._messages, False)
        segments: list[Segment] = []
        done = 0
        for place, (prompt, target) in cut.items():
            if len(prompt) < done or not whole.startswith(prompt + target):
                return None
            segments += [(whole[done : len(prompt)], False), (target, self._trained[place] or None)]
            done = len(prompt) + len(target)
        return [*segments, (whole[done:], False)]

    def _require_all_messages(self, count: int) -> None:
        """Raise ChatError if the template ignores the content of one of the first messages, by a mark at its end."""
        marked = [_with_mark(message, MARK.format(n)) for n, message in enumerate(self._messages[:count], start=1)]
        rendered = self._render(marked, False)
        for number, (message, plain) in enumerate(zip(marked, self._messages, strict=False), start=1):
            if message != plain and MARK.format(number) not in rendered:
                raise ChatError(f"the chat template drops message {number}, of role {message['role']!r}")


def _with_mark(message: Message, mark: str) -> Message:
    """Return a message with a mark at the end of its text, the same message if it has none."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return {**message, "content": content + mark}
    if isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]}
    return message


def _called(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _snap(text: str, place: int) -> int:
    """Return the last place up to ``place`` where a tag or white space ends: borders do not cut tags."""
    while place and text[place - 1] != ">" and not text[place - 1].isspace():
        place -= 1
    return place


def marked_example(marked: Marked, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[Segment]:
    """Return the one example of a chat whose template marks what the model writes by ``{% generation %}`` blocks.

    White space at the end of a block is no target: the model has ended its turn. Raises ChatError if nothing is marked,
    or a message says that it is no target.
    """
    if not all(map(is_trained, messages)):
        raise ChatError(
            "a message with weight 0 cannot be distinguished from others in a template with generation blocks"
        )
    try:
        text, blocks = marked(list(messages), tools=list(tools) if tools else None)
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise ChatError(f"the chat template refuses this chat: {first_line(error)}") from error
    segments: list[Segment] = []
    done = 0
    for start, end in blocks:
        stop = start + len(text[start:end].rstrip())
        if stop > start:
            segments += [(text[done:start], False), (text[start:stop], True)]
            done = stop
    if not segments:
        raise ChatError("the chat template marks no text of an assistant")
    return [*segments, (text[done:], False)]
