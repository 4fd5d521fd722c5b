"""Teachers in memory beside the student, whose whole distributions are the target.

Meant for small teachers, and as the reference against which a cache is measured. Legend: N target positions of a batch,
R those of the same texts in the teacher's vocabulary V, U the student's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray
from logitcask.pipeline.batches.collate import Batch, Collator, TrainingExample
from logitcask.pipeline.models.dense.rows import TeacherRows, TranslatedRows
from logitcask.pipeline.models.head import SLICE_LOGITS, LMHead, keeps_apart, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm, weights_fingerprint
from logitcask.pipeline.models.long_rope import short_length
from logitcask.pipeline.vocabulary.alignment import are_exchanged, unpack_companion
from logitcask.pipeline.vocabulary.bridge import Bridge
from logitcask.pipeline.vocabulary.covers import CoverFinder, Position
from logitcask.pipeline.vocabulary.projection import COPIES, Projector, pieces, whole_vocabulary
from logitcask.pipeline.vocabulary.spread import Spread


@dataclass(frozen=True)
class OnlineTeacher:
    """A float32 teacher with the student's tokenizer."""

    model: PreTrainedModel
    head: LMHead
    vocab_size: int  # larger ids are padding of the embedding, not tokens
    packs: bool  # whether examples may share a row
    fingerprint: str  # of its weights

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherRows:
        """Return the teacher's last hidden states at the batch's N target positions, with its head."""
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, enabled=False):
            hidden = last_hidden_states(self.model, ids, batch.get("position_ids"), self._lengths(batch))
        return TeacherRows(hidden.flatten(0, 1)[batch["target_index"]], self.head, self.vocab_size)

    def _lengths(self, batch: Batch) -> Tensor | None:
        """Return the tokens of each row, if each is an example."""
        return None if "position_ids" in batch else batch["is_token"].sum(1)


def load_online_teacher(source: str, vocab_size: int, device: torch.device) -> OnlineTeacher:
    """Load a teacher onto a device. Raises LogitcaskError if it cannot be loaded or its head cannot be separated."""
    model = load_causal_lm(source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    packs = short_length(model) is None and keeps_apart(model)
    return OnlineTeacher(model, read_head(model), vocab_size, packs, weights_fingerprint(model))


@dataclass(frozen=True)
class TranslatedTeacher:
    """A teacher with another tokenizer: its distributions are brought to the student's vocabulary, as in stage 1."""

    reader: OnlineTeacher  # of the teacher's own tokens
    bridge: Bridge
    spread: Spread
    packs: bool = True  # whether the student's examples may share a row; the teacher has rows of its own

    @property
    def fingerprint(self) -> str:
        """The digest of its weights."""
        return self.reader.fingerprint

    @cached_property
    def _finder(self) -> CoverFinder:
        return CoverFinder(self.bridge)

    @cached_property
    def _project(self) -> Projector:
        return Projector(self.bridge, self.reader.head.weight.device, self.spread)

    @cached_property
    def _order(self) -> Tensor:
        assert self.bridge.exchange is not None
        return torch.from_numpy(self.bridge.exchange).to(self.reader.head.weight.device)

    def __call__(self, batch: Batch) -> TranslatedRows:
        """Return what gives the distributions of the batch's N target positions over the student's vocabulary."""
        examples = batch["both_sides"].examples if "both_sides" in batch else ()  # a rank may have none
        read = [unpack_companion(example.companion) for example in examples]
        collate = Collator(0, (), 1.0, "sampled", packed=self.reader.packs)
        other = collate([TrainingExample(teacher, None) for teacher, _, _ in read])
        rows = self.reader({name: value.to(batch["input_ids"].device) for name, value in other.items()})
        sides = [(example, teacher) for example, (teacher, _, _) in zip(examples, read, strict=True)]
        if all(are_exchanged(*each, self.bridge) for each in sides):
            return TranslatedRows(lambda some: rows.logits(some)[:, self._order], len(self.bridge.student))
        positions = self._finder.batch(zip(examples, read, strict=True))
        translate = partial(self._translated, rows, other["gold"].numpy(), positions)
        return TranslatedRows(translate, len(self.bridge.student))

    def _translated(self, rows: TeacherRows, tokens_R: IntArray, positions: Sequence[Position], some: slice) -> Tensor:
        """Return log-probabilities (n, U) of some positions, a slice of the teacher's logits at a time."""
        size, parts = max(len(self.bridge.teacher), len(self.bridge.student)), list[Tensor]()
        for piece in pieces(positions[some], max(1, SLICE_LOGITS // size // COPIES)):
            used = slice(piece.first, piece.stop)
            log_q, tokens, _ = self._project(rows.logits(used), tokens_R[used], piece)
            parts.append(whole_vocabulary(log_q, tokens, len(self.bridge.student)))
        return torch.cat(parts)
