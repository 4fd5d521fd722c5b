"""Assign examples to shards, and a shard's examples to batches, from data and settings alone."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.cache.layout import stride_for
from logitcask.cache.manifest import LabelSettings, ShardPlan
from logitcask.cache.storage.ownership import Part
from logitcask.cache.writer import plan_digest
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.text.token_table import TokenTable


@dataclass(frozen=True)
class Work:
    """What there is to label: the same in every process that has the same data and settings.

    Legend: E examples, S shards.
    """

    table: TokenTable
    order: IntArray  # (E,) rows of the table, in cache order
    shard_examples: IntArray  # (S,) examples per shard
    batch_tokens: int
    label: LabelSettings

    def places(self, shard: int) -> range:
        """Return the indices in the cache of a shard's examples."""
        end = int(self.shard_examples[: shard + 1].sum())
        return range(end - int(self.shard_examples[shard]), end)

    def tokens(self, shard: int) -> int:
        """Return the number of tokens of a shard."""
        places = self.places(shard)
        rows = self.order[places.start : places.stop]
        return int((self.table.starts[rows + 1] - self.table.starts[rows]).sum())

    def positions(self, shard: int) -> int:
        """Return the number of target positions of a shard."""
        places = self.places(shard)
        return int(self.table.positions[self.order[places.start : places.stop]].sum())

    def measured(self, shard: int) -> NDArray[np.bool_]:
        """Return which of a shard's positions the fidelity certificate is measured on, (positions,), chosen by seed."""
        positions, wanted = self.positions(shard), -(-self.label.fidelity_positions // len(self.shard_examples))
        chosen = np.zeros(positions, dtype=bool)
        random = np.random.default_rng([self.label.seed, shard, 2])
        chosen[random.choice(positions, min(wanted, positions), replace=False)] = True
        return chosen

    def _metadata(self, place: int) -> dict[str, int]:
        row = int(self.order[place])
        return {name: int(codes[row]) for name, codes in self.table.codes.items()}

    def batches(self, shard: int) -> list[list[TokenizedExample]]:
        """Return a shard's examples, grouped into the batches that the teacher labels at once."""
        rows = [(place, self.table.example(int(self.order[place]))) for place in self.places(shard)]
        cuts = np.cumsum([example.target_mask.sum() for _, example in rows])[:-1]
        examples = [
            TokenizedExample(
                place, example.input_ids, example.target_mask, measured, self._metadata(place), example.companion
            )
            for (place, example), measured in zip(rows, np.split(self.measured(shard), cuts), strict=True)
        ]
        groups = plan_batches(np.array([example.read for example in examples]), self.batch_tokens)
        return [[examples[int(i)] for i in group] for group in groups]

    def calibration(self) -> list[list[TokenizedExample]]:
        """Return the batches of the first shard in a random order: the same for every part of a run."""
        batches = self.batches(0)
        return [batches[i] for i in np.random.default_rng([self.label.seed, 3]).permutation(len(batches))]


def shards_of(part: Part, count: int) -> range:
    """Return the shards of part i of n, i from 1: every n-th, so that parts are even."""
    return range(part[0] - 1, count, part[1])


def shuffled(examples: int, seed: int) -> IntArray:
    """Return the order of the examples in the cache, (examples,): random, so that reading it in order is random."""
    return np.random.default_rng(seed).permutation(examples)


def cut_shards(positions: IntArray, shard_positions: int) -> IntArray:
    """Return the examples per shard, (S,), filling shards in order up to ``shard_positions`` target positions.

    ``positions`` (E,) are those of the examples in cache order; an example longer than a shard gets one to itself.
    """
    ends = np.cumsum(positions, dtype=np.int64)
    cuts, first = [0], 0
    while first < len(ends):
        limit = (int(ends[first - 1]) if first else 0) + shard_positions
        first = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        cuts.append(first)
    bounds = np.array(cuts, dtype=np.int64)
    return bounds[1:] - bounds[:-1]


def plan_strides(shard_examples: IntArray, tokens: IntArray, positions: IntArray) -> ShardPlan:
    """Return the plan: its strides fit the fullest shard, in whole chunks. ``tokens`` and ``positions`` are (E,)."""
    starts = np.concatenate([[0], np.cumsum(shard_examples)[:-1]])
    return ShardPlan(
        count=len(shard_examples),
        examples=stride_for("example", int(shard_examples.max())),
        tokens=stride_for("token", int(np.add.reduceat(tokens, starts).max())),
        positions=stride_for("position", int(np.add.reduceat(positions, starts).max())),
        digest=plan_digest(shard_examples),
    )


def plan_batches(lengths: IntArray, batch_tokens: int) -> list[IntArray]:
    """Group examples of similar lengths, longest first, with at most ``batch_tokens`` tokens each, padding included."""
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        size = max(1, batch_tokens // int(lengths[order[first]]))
        batches.append(order[first : first + size])
        first += size
    return batches


@contextlib.contextmanager
def explain_limits() -> Iterator[None]:
    """Turn a manifest that readers would refuse into a one-line LogitcaskError with a remedy."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        rule = first["msg"].replace("Input should be", "must be", 1)
        raise LogitcaskError(f"readers would refuse this cache: {field}: {rule}: lower --shard-positions") from error
