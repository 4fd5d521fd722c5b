"""Statistics of the labels of a cache, from a bounded sample: the first committed shards, one in memory at a time.

Legend: N target positions, K head tokens, J temperatures. Entropies are in nats.
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import IntArray, Shard, SparseTargets, soft_labels
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader

SAMPLED_POSITIONS = 100_000  # shards are read until they hold this many
ROWS = 8192  # positions processed at a time
EXTREMES = 5  # examples shown at each end
SHOWN_CHARACTERS = 60
BINS = 40  # of the entropy histogram

Array64 = NDArray[np.float64]


class ExampleFigures(BaseModel):
    """One example: its index in the cache, the teacher's mean entropy over its positions, the beginning of its text."""

    index: int
    entropy: float
    text: str


class LabelFigures(BaseModel):
    """Statistics of the sampled labels; lists by temperature are in the order of ``temperatures``."""

    shards: int
    examples: int
    positions: int
    temperatures: list[float]
    captured_by_rank: list[list[float]]  # (J, K) mean mass of the first 1..K head tokens
    captured_mass: list[float]  # (J,) mean mass of the head
    entropy: list[float]  # (J,) of the teacher, mean over positions
    entropy_is_bound: bool  # without draws the tail's spread is unknown, so entropy is a lower bound
    entropy_edges: list[float]  # edges of the histogram's bins; the last bin holds all higher values too
    entropy_counts: list[list[int]]  # (J, bins) positions
    distinct_tail_draws: float
    gold_perplexity: float
    certainty_temperature: float  # the temperature at which examples are ranked
    most_certain: list[ExampleFigures]
    least_certain: list[ExampleFigures]


def sample_shards(reader: CacheReader, committed: Sequence[int], limit: int = SAMPLED_POSITIONS) -> Iterator[int]:
    """Yield the first committed shards, until they hold ``limit`` positions or more."""
    held = 0
    for index in committed:
        if held >= limit:
            return
        yield index
        held += len(reader.shard(index).targets)


def label_figures(reader: CacheReader, committed: Sequence[int], limit: int = SAMPLED_POSITIONS) -> LabelFigures | None:
    """Return statistics of the first committed shards, up to about ``limit`` positions; None if none is committed.

    Raises CacheFormatError if one is damaged.
    """
    label = reader.manifest.label
    edges = np.linspace(0.0, np.log(max(2, label.vocab_size)), BINS + 1)
    counts = np.zeros((len(label.temperatures), BINS), dtype=np.int64)
    sums = np.zeros((len(label.temperatures), label.head_size + 2))  # mass by rank, tail mass, entropy
    place = label.temperatures.index(1.0) if 1.0 in label.temperatures else 0
    examples: list[tuple[float, int]] = []
    shards, positions, distinct, gold = 0, 0, 0, 0.0
    for index in sample_shards(reader, committed, limit):
        shard = reader.shard(index)
        entropy_JN = np.zeros((len(label.temperatures), len(shard.targets)))
        for start in range(0, len(shard.targets), ROWS):
            targets = shard.targets[start : start + ROWS]
            for j, temperature in enumerate(label.temperatures):
                entropy_JN[j, start : start + ROWS] = entropies(targets, label, temperature)
                sums[j, :-1] += _masses(targets, temperature, j)
        sums[:, -1] += entropy_JN.sum(1)
        for j, row in enumerate(entropy_JN):
            counts[j] += np.histogram(np.clip(row, edges[0], edges[-1]), edges)[0]
        examples += _by_example(shard, entropy_JN[place], int(reader.shard_starts[index]))
        shards, positions = shards + 1, positions + len(shard.targets)
        distinct += int((shard.targets.tail_counts > 0).sum())
        gold += float(shard.targets.gold_logprobs.sum(dtype=np.float64))
    if positions == 0:
        return None
    means, examples = sums / positions, sorted(examples)
    texts = _Beginnings(reader)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-gold / positions))
    return LabelFigures(
        shards=shards,
        examples=len(examples),
        positions=positions,
        temperatures=label.temperatures,
        captured_by_rank=np.cumsum(means[:, :-2], axis=1).tolist(),
        captured_mass=(1 - means[:, -2]).tolist(),
        entropy=means[:, -1].tolist(),
        entropy_is_bound=label.tail_draws == 0,
        entropy_edges=edges.tolist(),
        entropy_counts=counts.tolist(),
        distinct_tail_draws=distinct / positions,
        gold_perplexity=perplexity,
        certainty_temperature=label.temperatures[place],
        most_certain=[texts.figures(*ranked) for ranked in examples[:EXTREMES]],
        least_certain=[texts.figures(*ranked) for ranked in examples[::-1][:EXTREMES]],
    )


def fidelity_of(reader: CacheReader, shards: Iterable[int]) -> FidelitySums:
    """Return the sums of the fidelity certificate over some shards; of no positions if none were measured."""
    label = reader.manifest.label
    total = FidelitySums.zeros(label.temperatures, exact=label.exact is not None)
    if label.fidelity_positions:
        for index in shards:
            total += reader.shard_fidelity(index)
    return total


def entropies(targets: SparseTargets, label: LabelSettings, temperature: float) -> Array64:
    """Return the teacher's entropy at a stored temperature, (N,): -sum of w(v) log p_T(v), unbiased with draws.

    Without draws all tokens outside the head count as one outcome, which gives a lower bound.
    """
    labels = soft_labels(targets, label.temperatures, temperature, "sampled")
    entropy: Array64 = -(labels.weights.astype(np.float64) * labels.log_probs).sum(1)
    if label.tail_draws == 0:
        entropy -= np.exp(labels.log_rest.astype(np.float64)) * labels.log_rest
    return entropy


def _masses(targets: SparseTargets, temperature: float, j: int) -> Array64:
    """Return sums over positions of the mass at each rank of the head, then of the mass outside it, (K + 1,)."""
    head = np.exp(targets.head_logprobs.astype(np.float64) / temperature - targets.log_partition[:, j, None])
    return np.append(head.sum(0), np.exp(targets.log_tail_mass[:, j].astype(np.float64)).sum())


def _by_example(shard: Shard, entropy_N: Array64, first: int) -> list[tuple[float, int]]:
    """Return the mean entropy and the index in the cache of each example that has target positions."""
    counts: IntArray = shard.position_count
    owner = np.repeat(np.arange(len(shard)), counts)
    means = np.bincount(owner, weights=entropy_N, minlength=len(shard)) / np.maximum(1, counts)
    return [(float(mean), first + i) for i, mean in enumerate(means) if counts[i]]


class _Beginnings:
    """The beginnings of examples: decoded by the cache's tokenizer, or as token ids if it has no readable one."""

    def __init__(self, reader: CacheReader) -> None:
        self._reader = reader
        self._tokenizer = None
        files = reader.tokenizer_files()
        if "tokenizer.json" in files:
            try:
                from tokenizers import Tokenizer

                self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
            except Exception:  # tokenizers raises no narrower class
                self._tokenizer = None

    def figures(self, entropy: float, index: int) -> ExampleFigures:
        """Return the figures of one example; its beginning is one line of printable characters."""
        ids = self._reader.example(index).input_ids[:SHOWN_CHARACTERS].tolist()
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False) if self._tokenizer else json.dumps(ids)[1:-1]
        line = "".join(char if char.isprintable() else " " for char in " ".join(decoded.split()))
        return ExampleFigures(index=index, entropy=entropy, text=line[:SHOWN_CHARACTERS])
