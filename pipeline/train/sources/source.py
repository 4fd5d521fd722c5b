"""The source of a run's examples in stage 2, and what is known of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.labels import IntArray
from logitcask.pipeline.batches.collate import Batch, Collator, Examples, MixedCollator, TeacherHead
from logitcask.pipeline.batches.mixture import MixedSampler, Mixture
from logitcask.pipeline.batches.order import BatchSampler, held_out
from logitcask.pipeline.models.dense.rows import DenseRows
from logitcask.pipeline.models.shapes import Amount


class TeacherInMemory(Protocol):
    """A teacher beside the student, whose whole distributions are the target."""

    @property
    def packs(self) -> bool:
        """Whether the student's examples may share a row."""
        ...

    @property
    def fingerprint(self) -> str:
        """The digest of its weights."""
        ...

    def __call__(self, batch: Batch) -> DenseRows:
        """Return what gives the distributions of the batch's target positions."""
        ...


@dataclass(frozen=True)
class Source:
    """A run's examples and what is known of them.

    Several sources mixed are a source again: its examples are those of its ``parts`` in order, and ``weights`` are the
    parts' shares of the target positions.
    """

    name: str
    examples: Examples
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    longest: int  # tokens of the longest example
    temperatures: tuple[float, ...]
    tail: str
    head_size: int
    labelled: bool  # whether examples come with labels
    shard_starts: IntArray
    identity: str  # digest of the cache's manifest, or of the data file: a resumed run must have the same
    amount: Amount
    lengths: Callable[[], IntArray]  # tokens per example; of a cache it reads one object per shard
    positions: Callable[[], IntArray]  # target positions per example, likewise
    teacher: TeacherInMemory | None = None
    teacher_head: TeacherHead | None = None  # which reads exact labels, if examples have those
    teacher_bytes: int = 0  # that it takes in memory
    parts: tuple["Source", ...] = ()
    weights: tuple[float, ...] = ()

    def held_out(self, fraction: float, seed: int) -> IntArray:
        """Return the examples kept for evaluation, ascending: of a mixture, the fraction of each part."""
        kept, first = list[IntArray](), 0
        for part in self.parts or (self,):
            kept.append(first + held_out(part.amount.examples, fraction, seed))
            first += part.amount.examples
        return np.concatenate(kept)

    def mixture(self, held: IntArray) -> Mixture | None:
        """Return how the parts are mixed without the held-out examples; None if there is nothing to mix."""
        if not self.parts:
            return None
        starts, positions, first = list[IntArray](), list[IntArray](), 0
        for part in self.parts:
            count = part.amount.examples
            left = np.delete(np.arange(count), held[(held >= first) & (held < first + count)] - first)
            starts.append(np.unique(np.searchsorted(left, part.shard_starts)))  # a shard may be held out altogether
            positions.append(part.positions()[left])
            first += count
        return Mixture(
            names=tuple(part.name for part in self.parts),
            shard_starts=tuple(starts),
            positions=tuple(part.astype(np.int32) for part in positions),
            weights=self.weights,
            seed=0,
            stop="first",
        )

    def sampler(
        self,
        held: IntArray,
        mixture: Mixture | None,
        batch_size: int,
        seed: int,
        *,
        rank: int,
        ranks: int,
        accumulation: int,
        packed: bool,
    ) -> BatchSampler:
        """Return the batches of one rank, without the held-out examples; of similar lengths unless they are packed."""
        if mixture is not None:
            return MixedSampler(mixture, batch_size, seed, rank, ranks, accumulation, left_out=held)
        lengths = None if packed else self.lengths()
        return BatchSampler(self.shard_starts, held, batch_size, seed, rank, ranks, lengths, accumulation)

    def collator(self, temperature: float, *, packed: bool) -> Collator:
        """Return what makes batches, with labels at a temperature."""
        pad = self.tokenizer.pad_token_id
        pad_id = 0 if pad is None else pad
        if not self.parts:
            return Collator(pad_id, self.temperatures, temperature, self.tail, packed, self.teacher_head)
        labelled = [part.labelled for part in self.parts]
        return MixedCollator(
            pad_id=pad_id,
            temperatures=self.temperatures,
            temperature=temperature,
            tail=self.tail,
            packed=packed,
            teacher_head=self.teacher_head,
            by_source=tuple(part.temperatures for part in self.parts),
            head_size=self.head_size,
            replays=any(labelled) and not all(labelled),
        )
