"""The chat templates of real models, which TRL ships, on chats of every shape: what of them is labelled.

``python -m tests.text.chats.real_templates`` rewrites the expected outcomes, so that a change shows as a diff.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from logitcask.pipeline.text.bad_records import EACH, ONE, WHOLE
from logitcask.pipeline.text.chats.forms import forms
from logitcask.pipeline.text.columns import RecordError, shape_record
from logitcask.pipeline.text.examples import Encoder
from tests.support.tiny import make_tokenizer

EXPECTED = Path(__file__).with_suffix(".txt")
(TRL,) = list((importlib.util.find_spec("trl") or pytest.fail("trl is missing")).submodule_search_locations or [])
TEMPLATES = {path.stem: path.read_text() for path in sorted(Path(TRL, "chat_templates").glob("*.jinja"))}
OLDER = Version(version("trl")) < Version("1.16")  # other templates than those whose outcomes are expected
ORIGINAL = [name for name in TEMPLATES if not name.endswith("_training")]
SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<[｜][^>]*>|\[/?[A-Z_]+\]|<(?:start|end)_of_\w+>|</?s>"
)
HOW = {WHOLE: "whole", EACH: "each", ONE: "one"}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _calls(content: str | None, arguments: Any, then: str = "") -> list[dict[str, Any]]:
    """Return a chat in which the assistant calls a tool; the reasoning is that before the call and that after it."""
    call = {"type": "function", "id": "call12345", "function": {"name": "plus", "arguments": arguments}}
    thought = [{"reasoning_content": text} for text in ("it is easy", "still so")] if then else [{}, {}]
    return [
        user("add 1 and 2"),
        assistant(content, tool_calls=[call], **thought[0]),
        {"role": "tool", "name": "plus", "tool_call_id": "call12345", "content": "result 3"},
        assistant("It is three.", **thought[1]),
    ]


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


TOOLS = [{"type": "function", "function": {"name": "plus", "description": "sum", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "description": "one"}}, "required": ["a"]}}}]  # fmt: skip
THOUGHT, AGAIN = "<think>\nit is easy\n</think>\n\nthree", "<think>\nstill so\n</think>\n\nseven"
SHAPES: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("add 1 and 2"), assistant("three")],
    "two turns": [user("add 1 and 2"), assistant("three"), user("and 4?"), assistant("seven")],
    "five turns": [message for n in range(5) for message in (user(f"question {n}"), assistant(f"answer {n}"))],
    "system": [{"role": "system", "content": "Be brief."}, user("add 1 and 2"), assistant("three")],
    "developer": [{"role": "developer", "content": "Be brief."}, user("add 1 and 2"), assistant("three")],
    "assistant first": [assistant("Welcome"), user("add 1 and 2"), assistant("three")],
    "<think> in the last turn": [user("good day"), assistant("hello"), user("add 1 and 2"), assistant(THOUGHT)],
    "<think> in an earlier turn": [user("add 1 and 2"), assistant(THOUGHT), user("and 4?"), assistant("seven")],
    "<think> in both turns": [user("add 1 and 2"), assistant(THOUGHT), user("and 4?"), assistant(AGAIN)],
    "reasoning_content in the last turn": [
        user("add 1 and 2"), assistant("three", reasoning_content="it is easy"),
    ],
    "reasoning_content in an earlier turn": [
        user("add 1 and 2"), assistant("three", reasoning_content="it is easy"), user("and 4?"), assistant("seven"),
    ],
    "reasoning_content in both turns": [
        user("add 1 and 2"), assistant("three", reasoning_content="it is easy"),
        user("and 4?"), assistant("seven", reasoning_content="still so"),
    ],
    "tool definitions": [user("add 1 and 2"), assistant("three")],
    "tool call, null content": _calls(None, {"a": 1}),
    "tool call, empty content": _calls("", {"a": 1}),
    "tool call, arguments as text": _calls("", '{"a": 1}'),
    "tool call, with content": _calls("I call.", {"a": 1}),
    "tool call, at the end": _calls(None, {"a": 1})[:2],
    "tool call, reasoning_content": _calls("", {"a": 1}, then="still so"),
    "question in parts": [user(_parts("first half, ", "second")), assistant("hello")],
    "all in parts": [
        user(_parts("first half, ", "second")), assistant(_parts("hel", "lo")), user("what else"), assistant("nothing"),
    ],
    "trailing user turn": [user("good day"), assistant("hello"), user("good night")],
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a chat: the reason that it was refused, or its examples' targets, each with the text before it."""

    refused: str
    how: str
    targets: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]

    def line(self) -> str:
        """Return it as a line of the expected outcomes."""
        if self.refused:
            return f"refused: {self.refused}"
        texts = " ".join(repr(text) for _, text in self.targets)
        return "; ".join([f"{self.how}: {texts}", *self.notices])


def tools_of(shape: str) -> list[dict[str, Any]] | None:
    """Return the tools that a chat of a shape may call."""
    return TOOLS if shape.startswith("tool") else None


def tokenizer_with(name: str) -> PreTrainedTokenizerFast:
    """Return a tiny tokenizer with a real template, and with the special tokens that it writes."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(sorted(set(SPECIAL.findall(TEMPLATES[name]))), special_tokens=True)
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def outcome(tokenizer: PreTrainedTokenizerFast, shape: str) -> Outcome:
    """Encode the chat of a shape."""
    lines: list[str] = []
    encoder = Encoder(tokenizer, prompt_loss=False, report=lines.append)
    tools = tools_of(shape)
    try:
        examples = encoder.examples({"messages": SHAPES[shape], **({"tools": tools} if tools else {})})
    except RecordError as error:
        return Outcome(str(error), "", (), ())
    targets: list[tuple[str, str]] = []
    for example in examples:
        ids, mask = example.input_ids.tolist(), [False, *example.target_mask[:-1].tolist()]
        begins = [n for n in range(len(ids)) if mask[n] and not mask[n - 1]]
        ends = [next((m for m in range(n, len(ids)) if not mask[m]), len(ids)) for n in begins]
        for begin, end in zip(begins, ends, strict=True):
            targets.append((tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:end])))
    (how,) = encoder.notices.records
    dated = [line for line in lines if "writes the date" not in line]
    return Outcome("", HOW[how], tuple(targets), tuple(dated))


def prompts_at_inference(tokenizer: PreTrainedTokenizerFast, shape: str, place: int) -> Iterator[str]:
    """Yield what the model may see before message ``place``, as transformers renders each form of the messages."""
    messages = shape_record({"messages": SHAPES[shape]}, {}).messages
    for group in forms(messages):
        for form in group:
            with contextlib.suppress(Exception):  # a template is a program of its own and raises what it likes
                texts, _ = render_jinja_template(
                    [form[:place]],
                    tools=tools_of(shape),
                    chat_template=tokenizer.chat_template,
                    add_generation_prompt=True,
                    **tokenizer.special_tokens_map,
                )
                yield str(texts[0])


def written(message: dict[str, Any], said: str = "") -> list[str]:
    """Return the texts of a message that its turn must hold; the user was told of those that it need not."""
    content = message["content"] or ""
    texts = [part["text"] for part in content] if isinstance(content, list) else content.split("</think>")
    texts = [] if "drops the text" in said and "tool_calls" in message else texts
    texts += [] if "render 'reasoning_content'" in said else [message.get("reasoning_content", "")]
    return [text.replace("<think>", "").strip() for text in texts if text]


def expected() -> dict[tuple[str, str], str]:
    """Return the expected outcomes by template and shape."""
    lines = (line.split("\t") for line in EXPECTED.read_text().splitlines())
    return {(name, shape): text for name, shape, text in lines}


if __name__ == "__main__":
    with EXPECTED.open("w") as file:
        for name in ORIGINAL:
            tokenizer = tokenizer_with(name)
            for shape in SHAPES:
                file.write(f"{name}\t{shape}\t{outcome(tokenizer, shape).line()}\n")
