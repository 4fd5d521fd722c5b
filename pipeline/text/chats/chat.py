"""Chats to segments of text: what the model sees, and what of it the model itself would have written.

A chat template is a program that renders messages to text. The target of an assistant turn is what the model would
generate there: everything after the generation prompt, up to and including the end of the turn. If the turns of a chat,
rendered one by one, are prefixes of the whole chat, the chat is one example. If the template rewrites earlier turns
(drops their reasoning, opens ``<think>`` in the generation prompt), each turn is an example of its own, as the model
would see it. Where a template marks what the model writes by ``{% generation %}`` blocks, these are the targets.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from logitcask.cache.errors import first_line
from logitcask.pipeline.text.chats.forms import END_THINK, THINK, Message, called_names, forms, is_trained, with_mark

Segment = tuple[str, bool | None]  # text, and whether its tokens are targets; None: never, whatever the settings
Marked = Callable[..., tuple[str, list[tuple[int, int]]]]  # (messages, tools=): text, places of {% generation %} blocks
Render = Callable[..., str]  # (messages, tools=, add_generation_prompt=)

MARK = "zqx{}xqz"  # put after a message's text, to see whether the template renders it
GREETING = "the chat template does not let an assistant begin: an answer before the first question is no target"
BESIDE_CALLS = "the chat template drops the text of an answer that calls tools"


class ChatError(ValueError):
    """A chat that the template cannot render, or renders so that its targets cannot be separated."""


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: what the model sees before it, and what it writes, piece by piece."""

    prompt: str
    written: tuple[Segment, ...]
    unseen: str = ""  # the end of the generation prompt, if the answer is rendered without it

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.written)


@dataclass(frozen=True)
class CutChat:
    """The examples of a chat, each a list of segments."""

    examples: list[list[Segment]]
    turns: int  # of the assistant that could be targets
    whole: bool  # whether it is one example, however many turns it has
    notices: tuple[str, ...]  # what the user should know of how the template rendered it


def cut_chat(
    render: Render,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    turns: str = "auto",
    eos: str = "",
    marked: Marked | None = None,
) -> CutChat:
    """Return the examples of a chat.

    ``turns``: ``auto`` makes one example if borders hold, else one per assistant turn; ``all`` one, or an error;
    ``each`` one per turn; ``last`` that of the last assistant turn alone. ``marked``: for a template with
    ``{% generation %}`` blocks. Raises ChatError with the reason: the template's own if it gives one.
    """
    reasons: list[tuple[int, str]] = []
    without_text: CutChat | None = None
    for group in forms(messages):
        for form in group:
            chat = _Chat(render, form, tools, [is_trained(message) for message in messages], eos, marked)
            try:
                cut = chat.examples(turns)
            except ChatError as error:
                reasons.append((0, str(error)))
            except Exception as error:  # a template is a program of its own and raises what it likes
                own = type(error) is TemplateError  # its raise_exception; another error is of a form it does not take
                reasons.append((1 if own else 2, f"the chat template refuses it: {first_line(error)}"))
            else:
                if BESIDE_CALLS not in cut.notices:
                    return cut
                without_text = without_text or cut
                break  # other contents may be rendered
    if without_text is not None:
        return without_text
    raise ChatError(min(reasons, key=lambda reason: reason[0])[1])


class _Chat:
    """One chat in one form."""

    def __init__(
        self,
        render: Render,
        messages: list[Message],
        tools: Sequence[Any] | None,
        trained: list[bool],
        eos: str,
        marked: Marked | None,
    ) -> None:
        self._messages, self._tools, self._plain_render, self._trained = messages, tools, render, trained
        self._eos, self._marked = eos, marked
        self._notices: list[str] = []

    def _render(self, messages: list[Message], generation: bool) -> str:
        more: Mapping[str, Any] = {"tools": list(self._tools)} if self._tools else {}
        return self._plain_render(messages, add_generation_prompt=generation, **more)

    def examples(self, turns: str) -> CutChat:
        places = [place for place, message in enumerate(self._messages) if message["role"] == "assistant"]
        if turns != "last" and len(places) > 1 and not self._may_begin(places[0]):
            self._notices.append(GREETING)
            places = places[1:]
        count = len(places)
        places = places[-1:] if turns == "last" else places
        if not any(self._trained[place] for place in places):
            raise ChatError("has no target: the chat has no assistant turn, or none of weight 1")
        cut = {place: self._marked_turn(place) if self._marked else self._turn(place) for place in places}
        for place, turn in cut.items():
            if any(name not in turn.text for name in called_names(self._messages[place])):
                raise ChatError("the chat template drops tool calls")
            if 0 <= turn.text.find(END_THINK) < turn.text.find(THINK):
                raise ChatError("the chat template puts the reasoning of an answer after reasoning of its own")
        self._require_all_messages(places[-1] + 1)
        whole = self._as_one(cut) if turns in ("auto", "all") else None
        if whole is None and turns == "all":
            raise ChatError("the chat template rewrites earlier turns, so the chat cannot be one example")
        self._notices += [
            f"the chat template renders an answer without {turn.unseen!r}, the end of its generation prompt: "
            "labels begin before it"
            for turn in cut.values()
            if turn.unseen.strip()
        ]
        notices = tuple(dict.fromkeys(self._notices))
        if whole is not None:
            return CutChat([whole], count, True, notices)
        examples = [[(turn.prompt, False), *turn.written] for place, turn in cut.items() if self._trained[place]]
        return CutChat(examples, count, False, notices)

    def _may_begin(self, place: int) -> bool:
        """Return whether the template renders a chat that ends with an answer before the first question."""
        if any(message["role"] == "user" for message in self._messages[:place]):
            return True
        try:
            self._render(self._messages[: place + 1], False)
        except TemplateError as error:
            return type(error) is not TemplateError
        return True

    def _marked_turn(self, place: int) -> _Turn:
        """Return an assistant turn by its generation blocks, those that end after the messages before it.

        White space at the end of a block is no target: the model has ended its turn.
        """
        assert self._marked is not None
        text, blocks = self._marked(self._messages[: place + 1], tools=list(self._tools) if self._tools else None)
        begin = _common(self._render(self._messages[:place], False), text) if place else 0
        done, written = 0, list[Segment]()
        for start, end in blocks:
            stop = start + len(text[start:end].rstrip())
            if stop > max(start, begin):
                written += [(text[done:start], False), (text[start:stop], True)]
                done = stop
        if not written:
            raise ChatError("the chat template marks no text of an assistant")
        return _Turn(written[0][0], tuple(written[1:]))

    def _turn(self, place: int) -> _Turn:
        """Return an assistant turn by its generation prompt."""
        after = self._ended(place, self._render(self._messages[: place + 1], False).rstrip())
        before = self._render(self._messages[:place], True) if place else self._first_prompt(after)
        if after.startswith(before):
            return _Turn(before, ((after[len(before) :], True),))
        border = _snap(before, _common(before, after))
        generation = _common(self._render(self._messages[:place], False), before) if place else 0
        if border < generation or not border:  # with this answer, the template renders the messages before otherwise
            return _Turn(before, ((self._rewritten(place, after, before[generation:]), True),))
        reasoned = self._with_reasoning(self._messages[place], before, after[border:])
        if reasoned is not None:
            return _Turn(before, ((reasoned, True),))
        return _Turn(after[:border], ((after[border:], True),), before[border:])

    def _rewritten(self, place: int, after: str, prompt: str) -> str:
        """Return what comes after the generation prompt of the last turn of a rendering; it may be empty.

        An answer of another text is rendered equally up to where this one begins.
        """
        text = self._messages[place].get("content")
        probe = "!" if isinstance(text, str) and text.startswith("?") else "?"
        other = self._render([*self._messages[:place], {"role": "assistant", "content": probe}], False)
        border = _common(after, other)
        if not prompt.strip():
            return after[border:]
        start = after.rfind(prompt, 0, border)
        if start < 0:
            raise ChatError("the chat template renders a turn otherwise than after its own generation prompt")
        return after[start + len(prompt) :]

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
        if not prompt:
            return after[: _snap(after, _common(after, plain))]
        while prompt and prompt not in after:  # a rendering need not go through the whole of it
            prompt = prompt[: _snap(prompt, len(prompt) - 1)]
        if not prompt:
            raise ChatError("the chat template cannot begin with an assistant turn")
        return after[: after.index(prompt) + len(prompt)]

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

    def _as_one(self, cut: Mapping[int, _Turn]) -> list[Segment] | None:
        """Return the whole chat as one example, None if its turns are not rendered as each alone."""
        whole = self._render(self._messages, False)
        segments: list[Segment] = []
        done = 0
        for place, turn in cut.items():
            if len(turn.prompt) < done or not whole.startswith(turn.prompt + turn.text):
                return None
            trained = self._trained[place] or None
            segments.append((whole[done : len(turn.prompt)], False))
            segments += [(text, trained if target else False) for text, target in turn.written]
            done = len(turn.prompt) + len(turn.text)
        return [*segments, (whole[done:], False)]

    def _require_all_messages(self, count: int) -> None:
        """Raise ChatError if the template ignores the content of one of the first messages, by a mark at its end.

        An answer must be rendered where it is the last message: some templates drop one from later prompts.
        """
        marked = [with_mark(message, MARK.format(n)) for n, message in enumerate(self._messages[:count], start=1)]
        rendered = self._render(marked, False)
        lists = [message["content"] for message in marked if isinstance(message.get("content"), list)]
        if any(repr(parts) in rendered or json.dumps(parts, ensure_ascii=False) in rendered for parts in lists):
            raise ChatError("the chat template prints a list of text parts as it is")
        for number, (message, plain) in enumerate(zip(marked, self._messages, strict=False), start=1):
            if message == plain or MARK.format(number) in rendered:
                continue
            role = message["role"]
            if role == "assistant" and MARK.format(number) in self._render(marked[:number], False):
                continue
            if not message.get("tool_calls"):
                raise ChatError(f"the chat template drops message {number}, of role {role!r}")
            self._notices.append(BESIDE_CALLS)


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
