"""Which examples make which shard, and which of a shard's examples make which batch: from data and settings only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray
from logitcask.cache.layout import stride_for
from logitcask.cache.manifest import LabelSettings, ShardPlan
from logitcask.cache.storage.ownership import Part
from logitcask.cache.writer import plan_digest
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.text.token_table import TokenTable


@dataclass(frozen=True)
class Work:
    """What there is to label: every process that has the same data and settings has the same."""

    table: TokenTable
    order: IntArray  # (E,) places in the table, in cache order
    shard_examples: IntArray  # (S,)
    batch_tokens: int
    label: LabelSettings

    def places(self, shard: int) -> range:
        """The shard's examples, by place in the cache."""
        end = int(self.shard_examples[: shard + 1].sum())
        return range(end - int(self.shard_examples[shard]), end)

    def positions(self, shard: int) -> int:
        """Target positions of a shard."""
        places = self.places(shard)
        return int(self.table.positions[self.order[places.start : places.stop]].sum())

    def measured(self, shard: int) -> NDArray[np.bool_]:
        """Which of a shard's positions the fidelity certificate is measured on, (positions,): chosen by seed."""
        positions, asked = self.positions(shard), -(-self.label.fidelity_positions // len(self.shard_examples))
        chosen = np.zeros(positions, dtype=bool)
        random = np.random.default_rng([self.label.seed, shard, 2])
        chosen[random.choice(positions, min(asked, positions), replace=False)] = True
        return chosen

    def batches(self, shard: int) -> list[list[TokenizedExample]]:
        """A shard's examples in the batches that a teacher labels at once."""
        found = [(place, self.table.example(int(self.order[place]))) for place in self.places(shard)]
        cuts = np.cumsum([example.target_mask.sum() for _, example in found])[:-1]
        examples = [
            TokenizedExample(place, example.input_ids, example.target_mask, measured)
            for (place, example), measured in zip(found, np.split(self.measured(shard), cuts), strict=True)
        ]
        groups = plan_batches(np.array([len(example.input_ids) for example in examples]), self.batch_tokens)
        return [[examples[int(i)] for i in group] for group in groups]


def shards_of(part: Part, count: int) -> range:
    """The shards of part i of n, from 1: every n-th, so that parts are even."""
    return range(part[0] - 1, count, part[1])


def shuffled(examples: int, seed: int) -> IntArray:
    """The order in which the data's examples enter the cache, (examples,): reading the cache in order is random."""
    return np.random.default_rng(seed).permutation(examples)


def cut_shards(positions: IntArray, shard_positions: int) -> IntArray:
    """Examples of each shard, (S,): shards are filled in order up to ``shard_positions`` target positions.

    ``positions`` (E,) are those of the examples in cache order; one that is longer than a shard gets its own.
    """
    ends = np.cumsum(positions, dtype=np.int64)
    cuts, first = [0], 0
    while first < len(ends):
        limit = (int(ends[first - 1]) if first else 0) + shard_positions
        first = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        cuts.append(first)
    found = np.array(cuts, dtype=np.int64)
    return found[1:] - found[:-1]


def plan_strides(shard_examples: IntArray, tokens: IntArray, positions: IntArray) -> ShardPlan:
    """The plan's strides: the fullest shard of each axis, in whole chunks. ``tokens``, ``positions`` are (E,)."""
    starts = np.concatenate([[0], np.cumsum(shard_examples)[:-1]])
    return ShardPlan(
        count=len(shard_examples),
        examples=stride_for("example", int(shard_examples.max())),
        tokens=stride_for("token", int(np.add.reduceat(tokens, starts).max())),
        positions=stride_for("position", int(np.add.reduceat(positions, starts).max())),
        digest=plan_digest(shard_examples),
    )


def plan_batches(lengths: IntArray, batch_tokens: int) -> list[IntArray]:
    """Groups of a shard's examples of about one length, padded size at most ``batch_tokens``; longest first."""
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        size = max(1, batch_tokens // int(lengths[order[first]]))
        batches.append(order[first : first + size])
        first += size
    return batches
