"""Records to examples in two vocabularies: a student's, and that of the teacher who labels them."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.columns import RecordError, shape_record
from logitcask.pipeline.text.examples import Encoder, Finished
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.alignment import align, pack_companion
from logitcask.pipeline.vocabulary.bridge import Bridge


def set_templates(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    template: Path | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Give a student the chat template in a file, if any, and both sides defaults of their templates' variables.

    Raises LogitcaskError if the file cannot be used, or the teacher's template does not read a variable.
    """
    set_template(teacher, None, kwargs)
    set_template(student, template, {})
    with contextlib.suppress(LogitcaskError):  # its template need not read what the teacher's does
        set_template(student, None, kwargs)


class PairEncoder(Encoder):
    """Encodes records with a student's tokenizer and chat template, and beside it with the teacher's.

    Options are those of ``Encoder``, for both.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, bridge: Bridge, **options: Any
    ) -> None:
        super().__init__(student, **options)
        self._teacher = Encoder(teacher, **options, report=_ignore)
        each = {**options, "turns": "each"}
        self._turn_by_turn = [Encoder(side, **each, report=_ignore) for side in (student, teacher)]
        self._bridge = bridge
        self.finish = self._aligned

    def examples(self, raw: Mapping[str, Any]) -> list[Encoded]:
        """Return the examples of a record in the student's vocabulary, each with the same in the teacher's.

        A chat that the two chat templates cut otherwise is cut into its turns.
        """
        if shape_record(raw, self._columns).tokens is not None:
            raise RecordError("holds token ids: labels in another vocabulary need text")
        ours, theirs = super().examples(raw), self._other(self._teacher, raw)
        if len(ours) != len(theirs):
            ours, theirs = self._turn_by_turn[0].examples(raw), self._other(self._turn_by_turn[1], raw)
        if len(ours) != len(theirs):
            raise RecordError(f"the two chat templates cut it into {len(ours)} and {len(theirs)} examples")
        return [replace(own, other=other) for own, other in zip(ours, theirs, strict=True)]

    def _other(self, encoder: Encoder, raw: Mapping[str, Any]) -> list[Encoded]:
        encoder.day = self.day
        try:
            return encoder.examples(raw)
        except RecordError as error:
            raise RecordError(f"for the teacher: {error}") from error
        finally:
            self.notices.date = self.notices.date or encoder.notices.date

    def _aligned(self, example: Encoded) -> Finished:
        assert example.other is not None
        alignment = align(example, example.other, self._bridge)
        straddling, labelled = int(np.count_nonzero(alignment.offsets)), len(alignment.tokens)
        kinds = labelled - straddling, straddling, int(np.count_nonzero(example.target_mask)) - labelled
        companion = pack_companion(example.other, alignment)
        return replace(example, target_mask=alignment.labelled, other=None, companion=companion), kinds

    def silent(self) -> Self:
        """Return an encoder like this one that has found out nothing and reports nothing, to be sent to a process."""
        other = super().silent()
        other._teacher = self._teacher.silent()
        other._turn_by_turn = [encoder.silent() for encoder in self._turn_by_turn]
        other.finish = other._aligned
        return other

    @property
    def is_portable(self) -> bool:
        """Whether another process can use it."""
        return super().is_portable and self._teacher.is_portable

    def key(self) -> str | None:
        """Return a digest of all that examples depend on but the records and the day, unless it is given."""
        keys = [super().key(), self._teacher.key()]
        if None in keys:
            return None
        digest = hashlib.sha256(" ".join(map(str, keys)).encode())
        for file in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()


def _ignore(notice: str) -> None:
    pass
