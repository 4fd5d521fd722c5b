"""Labels in a student's vocabulary, by the transformers engine.

Legend: B sequences per batch, L their padded length, N labelled positions, R target positions of the teacher, U the
student's vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import IntArray, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.teachers.fidelity_probe import Probe
from logitcask.pipeline.teachers.labelling import batch_draws, label_rows, slice_rows, split_rows
from logitcask.pipeline.teachers.teacher import Labelled, TeacherFacts, TokenizedExample, next_tokens
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.alignment import are_exchanged, unpack_companion
from logitcask.pipeline.vocabulary.bridge import Bridge
from logitcask.pipeline.vocabulary.covers import CoverFinder, Position
from logitcask.pipeline.vocabulary.projection import COPIES, Projector, pieces, whole_vocabulary
from logitcask.pipeline.vocabulary.spread import Spread


class Reader(Protocol):
    """What is used of a teacher that reads its own tokens: ``TransformersTeacher``."""

    facts: TeacherFacts

    @property
    def head(self) -> LMHead:
        """Its output head."""
        ...

    def target_states(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the last hidden states of the target positions, (R, H)."""
        ...

    def room(self, label: LabelSettings) -> Tensor:
        """Return the memory for a slice of logits."""
        ...

    def probe(self, label: LabelSettings) -> Probe | None:
        """Return what measures the fidelity certificate, if it is wanted."""
        ...


class TranslatedTeacher:
    """A teacher that reads its own tokens and labels a student's."""

    def __init__(self, teacher: Reader, bridge: Bridge, spread: Spread | None = None) -> None:
        self.facts = teacher.facts
        self._teacher, self._bridge, self._finder = teacher, bridge, CoverFinder(bridge)
        self._device = teacher.head.weight.device
        self._project = Projector(bridge, self._device, spread)

    def expect(self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings) -> None:
        """Do nothing: batches are labelled one after another."""

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """Return the labels of each example's target positions."""
        read = [unpack_companion(example.companion) for example in batch]
        texts = [teacher for teacher, _, _ in read]
        counts = [int(example.target_mask.sum()) for example in batch]
        with torch.inference_mode():
            hidden_RH = self._teacher.target_states(texts)
            own = [Encoded(example.input_ids, example.target_mask) for example in batch]
            if all(are_exchanged(*sides, self._bridge) for sides in zip(own, texts, strict=True)):
                targets, fidelity = self._exchanged(hidden_RH, batch, counts, label)
                nats = -float(targets.gold_logprobs.sum(dtype=np.float64))
                size = sum(len(self._bridge.student[token] or b"") for token in next_tokens(batch).tolist())
                projection = np.array([size, nats, nats])
            else:
                positions = self._finder.batch(zip(own, read, strict=True))
                own_R = next_tokens(texts)
                targets, fidelity, projection = self._projected(hidden_RH, own_R, positions, batch, counts, label)
        return Labelled(split_rows(targets, counts), fidelity, projection)

    def _exchanged(
        self, hidden_NH: Tensor, batch: Sequence[TokenizedExample], counts: Sequence[int], label: LabelSettings
    ) -> tuple[SparseTargets, FidelitySums]:
        """Return the labels that the teacher gives its own tokens, under the student's ids."""
        assert self._bridge.exchange is not None
        room, order = self._teacher.room(label), torch.from_numpy(self._bridge.exchange).to(self._device)
        same = bool((self._bridge.exchange == np.arange(len(order))).all())

        def logits(hidden: Tensor) -> Tensor:
            own = self._teacher.head.logits(hidden, room=room)
            return own if same else own[:, order]

        return label_rows(
            logits,
            hidden_NH,
            next_tokens(batch),
            batch_draws(batch, counts, label),
            np.concatenate([example.measured for example in batch]),
            label,
            self._teacher.probe(label),
            len(room),
        )

    def _projected(
        self,
        hidden_RH: Tensor,
        own_R: IntArray,
        positions: Sequence[Position],
        batch: Sequence[TokenizedExample],
        counts: Sequence[int],
        label: LabelSettings,
    ) -> tuple[SparseTargets, FidelitySums, NDArray[np.float64]]:
        """Return the labels by projection, and its sums."""
        own_size = len(self._bridge.teacher)
        rows = slice_rows(max(own_size, len(self._project.reached)), self._device, fresh=False)
        rows = max(1, rows // COPIES) if self._device.type == "cpu" else rows
        golds, uniforms = next_tokens(batch), batch_draws(batch, counts, label)
        measured, done = np.concatenate([example.measured for example in batch]), 0
        parts, fidelity, total = list[SparseTargets](), FidelitySums.zeros(label.temperatures), np.zeros(3)
        for piece in pieces(positions, rows):
            used, cut = slice(piece.first, piece.stop), slice(done, done + len(piece.positions))
            logits_RV = self._teacher.head.logits(hidden_RH[used])[:, :own_size]
            log_q, reached, projection = self._project(logits_RV, own_R[used], piece)
            del logits_RV
            if measured[cut].any() or len(reached) <= label.head_size:
                log_q, reached = whole_vocabulary(log_q, reached, label.vocab_size), np.arange(label.vocab_size)
            at = torch.tensor([position.start.row for position in piece.positions], device=self._device)
            targets, sums = label_rows(
                lambda _, log_q=log_q: log_q,  # type: ignore[misc]
                hidden_RH[at],
                np.searchsorted(reached, golds[cut]),
                uniforms[cut],
                measured[cut],
                label.model_copy(update={"vocab_size": len(reached)}),
                self._teacher.probe(label),
                len(piece.positions),
            )
            parts.append(_under_ids(targets, reached))
            fidelity += sums
            total += projection
            done = cut.stop
        return SparseTargets.concatenate(parts), fidelity, total


def _under_ids(targets: SparseTargets, tokens: IntArray) -> SparseTargets:
    """Return labels whose ids are places among some tokens with the tokens in their place."""
    tail_ids = np.where(targets.tail_counts > 0, tokens[targets.tail_ids], 0)
    return replace(targets, head_ids=tokens[targets.head_ids], tail_ids=tail_ids)
