"""Examples: records to token ids and target masks.

A record, of any shape that ``columns`` knows, is cut into segments of text, each a target or not. Segments are encoded
separately, so that the boundary between prompt and response falls where it falls when the student generates. Position
t is a target position if token t + 1 belongs to a target. Begin and end tokens that a text already has are not added
again.
"""

import contextlib
import copy
import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from logitcask.pipeline.console import say
from logitcask.pipeline.text.bad_records import EACH, LAST, ONE, PROMPT, WHOLE, Notices
from logitcask.pipeline.text.chats.chat import ChatError, Segment, cut_chat
from logitcask.pipeline.text.chats.forms import Message
from logitcask.pipeline.text.columns import Record, RecordError, metadata_of, shape_record
from logitcask.pipeline.text.tokenizer import tokenizer_size
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.text.tokens.ready import ready_rows

Part = tuple[list[int], bool]  # the token ids of a segment, and whether they are targets
Finished = tuple["Encoded", Sequence[int]]  # an example with its companion, and its positions by kind
Outcome = list["Encoded"] | str  # of a record: its examples, or why it is bad
OPTIONAL_KEYS = {"name", "reasoning_content", "reasoning", "thinking"}  # of a message: templates need not render them


class Encoder:
    """Encodes records as token ids and target masks, with one tokenizer.

    A chat template that writes the date writes that of ``day``, today by default, at midnight. ``report`` gets each
    notice once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_loss: bool,
        day: datetime.date | None = None,
        turns: str = "auto",
        columns: Mapping[str, str] | None = None,
        report: Callable[[str], None] = say,
    ) -> None:
        self._tokenizer, self.prompt_loss, self._turns = tokenizer, prompt_loss, turns
        self._columns = columns or {}  # our names of the user's columns
        self.day, self._pinned = day or datetime.date.today(), day
        self._report = report
        self.notices = Notices()
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *added}
        self._controls = {*tokenizer.all_special_ids, *(token for token in added if added[token].special)}
        self._known: dict[str, list[int]] = {}  # ids of the record's texts
        empty = tokenizer("").input_ids
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._begin = self._bos if tokenizer.bos_token_id in empty else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # SentencePiece tokenizers put a blank before a text (some: unless it has one); a continuation must not get one.
        self._joins = self._ids("a b") == self._ids("a") + self._ids(" b") and self._ids("b") != self._ids(" b")
        self._sentinel = [] if self._joins else self._ids("\n")

    def examples(self, raw: Mapping[str, Any]) -> list[Encoded]:
        """Return the examples of a record: one, or one per turn of a chat, or one per row that was packed.

        Raises RecordError if the record cannot be used, or has no target.
        """
        self._known.clear()
        try:
            record = shape_record(raw, self._columns)
            for column in sorted(record.unused):
                self._say_once(f"column {column!r} is not used")
            if record.tokens is not None:
                encoded = [Encoded(*row) for row in ready_rows(record.tokens, self._vocab_size)]
                shape = "token ids, packed rows" if len(encoded) > 1 else "token ids"
            else:
                shape, parts = self._parts(record)
                encoded = [self._masked(each) for each in parts]
        except ChatError as error:
            self.notices.refused_chats += 1
            raise RecordError(str(error)) from error
        if not all(example.target_mask.any() for example in encoded):
            raise RecordError("has no target: the text after its first token is empty")
        self.notices.count(shape, len(encoded))
        metadata = metadata_of(raw, self._columns)
        return [replace(example, metadata=metadata) for example in encoded] if metadata else encoded

    @cached_property
    def _vocab_size(self) -> int:
        """The largest token id plus one: ids may have gaps, as those of tokens added with a reserve do."""
        return tokenizer_size(self._tokenizer)

    def outcome(self, record: Mapping[str, Any] | RecordError) -> Outcome:
        """Return the examples of what was read, or why it cannot be used."""
        try:
            return str(record) if isinstance(record, RecordError) else self.examples(record)
        except RecordError as error:
            return str(error)

    finish: Callable[[Encoded], Finished] | None = None  # what is done with examples once they are truncated

    def silent(self) -> Self:
        """Return an encoder like this one that has found out nothing and reports nothing, to be sent to a process."""
        other = copy.copy(self)
        other.notices, other._report = Notices(), _ignore
        return other

    def take(self, notices: Notices) -> None:
        """Take what an encoder like this one found out."""
        self.notices.merge(notices, self._report)

    @property
    def is_portable(self) -> bool:
        """Whether another process can use it: one with a tokenizer that comes with code of its own stays here."""
        return type(self._tokenizer).__module__.startswith("transformers.")

    def key(self) -> str | None:
        """Return a digest of all that examples depend on but the records and the day, unless it is given.

        None if the tokenizer has more than a digest could cover.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not self.is_portable:
            return None
        digest = hashlib.sha256(backend.to_str().encode())
        for file in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
        tokenizer = [type(self._tokenizer).__name__, self._tokenizer.special_tokens_map, self._tokenizer.chat_template]
        options = [self.prompt_loss, self._turns, self._columns, self._pinned]
        packages = [version(name) for name in ("logitcask", "transformers", "tokenizers", "jinja2", "numpy")]
        digest.update(json.dumps([tokenizer, options, packages], default=str, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def date(self) -> str | None:
        """The day that a template wrote, YYYY-MM-DD; None if it wrote none."""
        return self.notices.date

    def _say_once(self, notice: str) -> None:
        self.notices.add(notice, self._report)

    def _parts(self, record: Record) -> tuple[str, list[list[Part]]]:
        """Return the name of a record's shape, and the parts of each of its examples."""
        if record.kind == "text":
            return "text", [self._closed([(record.text, True)])]
        if record.kind == "prompt" and not self._tokenizer.chat_template:
            return PROMPT, [self._closed([(record.prompt, self.prompt_loss), (record.response, True)])]
        turns: list[Message] = [dict(message) for message in record.messages] or [
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": record.response},
        ]
        shape, examples = self._chat(turns, record.tools)
        return shape if record.messages else PROMPT, [self._encode(segments) for segments in examples]

    def _masked(self, parts: list[Part]) -> Encoded:
        ids = np.array([token for part, _ in parts for token in part], dtype=np.int64)
        mask = np.zeros(len(ids), dtype=bool)
        mask[:-1] = [targeted for part, targeted in parts for _ in part][1:]
        return Encoded(ids, mask)

    def _chat(self, messages: list[Message], tools: tuple[Any, ...]) -> tuple[str, list[list[Segment]]]:
        """Return the name of a chat's shape, and the segments of each of its examples."""
        if not self._tokenizer.chat_template:
            raise ChatError("it is a chat, but the tokenizer has no chat template: use prompt and response")
        for message in messages:
            if (
                message["role"] == "assistant"
                and isinstance(message.get("content"), str)
                and self._ends(message["content"])
            ):
                message["content"] = message["content"].rstrip().removesuffix(self._tokenizer.eos_token)
        marks = "{% generation" in self._template() or "{%- generation" in self._template()
        eos = self._tokenizer.eos_token or ""
        chat = cut_chat(self._render, messages, tools, self._turns, eos, self._render_marked if marks else None)
        self._say_what_is_ignored(messages, "".join(text for segments in chat.examples for text, _ in segments))
        for notice in chat.notices:
            self._say_once(notice)
        for segments in chat.examples:
            for text, targeted in segments:
                if targeted and not self._ends_a_turn(text):
                    self._say_once(
                        "the chat template writes no end of turn after an answer: students learn no place to stop"
                    )
        several = (WHOLE if chat.whole else LAST if self._turns == "last" else EACH) if chat.turns > 1 else ONE
        return several, [
            [(text, self.prompt_loss if targeted is False else bool(targeted)) for text, targeted in segments]
            for segments in chat.examples
        ]

    def _say_what_is_ignored(self, messages: list[Message], rendered: str) -> None:
        for message in messages:
            for key in OPTIONAL_KEYS & message.keys():
                if isinstance(message[key], str) and message[key].strip() not in rendered:
                    self._say_once(f"the chat template does not render {key!r}")

    def _template(self) -> str:
        return str(self._tokenizer.get_chat_template())

    def _ends_a_turn(self, text: str) -> bool:
        """Return whether a target ends with a special token, which a student can learn to stop at."""
        ids = self._ids(text)
        return bool(ids) and ids[-1] in self._special

    def _closed(self, segments: list[Segment]) -> list[Part]:
        """Return the parts of what no template rendered, with one begin and one end token.

        White space after an end token of the text's own is no target.
        """
        text = segments[-1][0]
        kept = text.rstrip() if self._ends(text) else text
        parts = self._encode([*segments[:-1], (kept, True), (text[len(kept) :], self.prompt_loss)])
        last = parts[-2][0]
        parts[-2] = (last if last[-1:] == self._end else last + self._end, True)
        first = next((part for part, _ in parts if part), [])
        return parts if first[:1] == self._begin else [(self._begin, False), *parts]

    def _encode(self, segments: list[Segment]) -> list[Part]:
        """Return the token ids of each segment, with no begin or end token twice in a row at its ends.

        What ends an answer need not be the end token: Gemma's is ``<end_of_turn>``.
        """
        parts: list[Part] = []
        started = False
        for text, targeted in segments:
            ids = self._continued(text) if started and not self._joins else self._ids(text)
            while self._bos and not started and ids[:2] == self._bos * 2:
                ids = ids[1:]
            ends = self._controls if targeted else self._end
            while len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in ends:
                ids = ids[:-1]
            parts.append((ids, bool(targeted)))
            started = started or bool(ids)
        return parts

    def _ends(self, text: str) -> bool:
        """Return whether a text ends with the end token's string, before white space."""
        return bool(self._end) and text.rstrip().endswith(self._tokenizer.eos_token)

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def _continued(self, text: str) -> list[int]:
        """Return the ids of a text that continues another: encoded after a sentinel, which is cut off."""
        whole, begin = self._ids("\n" + text), self._sentinel
        return whole[len(begin) :] if whole[: len(begin)] == begin else self._ids(text)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Apply the chat template with the encoder's day as its clock, which transformers does not let callers pass.

        It gets messages as they are: ``apply_chat_template`` leaves out keys without a value.
        """
        template = self._tokenizer.get_chat_template(tools=options.get("tools"))
        with self._clock(template):
            texts, _ = render_jinja_template(
                [messages], chat_template=template, **self._tokenizer.special_tokens_map, **options
            )
        return str(texts[0])

    @contextlib.contextmanager
    def _clock(self, template: str) -> Iterator[None]:
        known = _compile_jinja_template(template).environment.globals  # of this template alone
        clock, known["strftime_now"] = known["strftime_now"], self._strftime
        try:
            yield
        finally:
            known["strftime_now"] = clock

    def _strftime(self, form: str) -> str:
        self.notices.date = self.day.isoformat()
        self._say_once(f"the chat template writes the date into the examples: {self.date}")
        return datetime.datetime.combine(self.day, datetime.time()).strftime(form)

    def _render_marked(self, messages: list[Message], tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendering and the places of its generation blocks."""
        with self._clock(self._template()):
            texts, places = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._template(),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return str(texts[0]), places[0]


def _ignore(notice: str) -> None:
    pass
