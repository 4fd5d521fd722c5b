"""Soft labels in memory: as the cache stores them, and as weights at one temperature, which the loss takes.

Stage 1 makes ``SparseTargets``, grouped into an ``Example`` and a ``Shard``; the cache stores those. ``soft_labels``
turns them into ``SoftLabels`` for training and evaluation.

Legend: N target positions, K head tokens, M tail draws, J stored temperatures, S label entries (K, or K + M),
E examples of a shard, L tokens of an example. Log-probabilities l(v) are in nats, at T=1, normalised over the teacher's
full vocabulary before anything is dropped.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.fidelity import FidelitySums

A = TypeVar("A")
B = TypeVar("B")
Array = NDArray[Any]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
SHARDS_KEPT = 2  # decoded shards kept in memory, unless another number is asked for: a batch may straddle two
MASS_FLOOR = -64.0  # nats: the log mass given to a tail of no mass, so that reverse KL stays finite


@dataclass(frozen=True)
class SparseTargets:
    """Sparse soft labels of N positions, one row each.

    Draws are distinct ids with counts; a slot with count 0 is padding (id 0, log-probability 0). Integer types may be
    narrower than int64, as in the cache.
    """

    head_ids: IntArray  # (N, K) the K most probable tokens, most probable first
    head_logprobs: FloatArray  # (N, K) l(v)
    tail_ids: IntArray  # (N, M) distinct tokens drawn outside the head, ascending, padding last
    tail_logprobs: FloatArray  # (N, M) l(v)
    tail_counts: IntArray  # (N, M) how often each was drawn; a row sums to M, or to 0 if there is no tail
    log_partition: FloatArray  # (N, J) A(t) = log sum_v exp(l(v) / t)
    log_tail_mass: FloatArray  # (N, J) log of the probability outside the head at t; -inf if there is none
    gold_logprobs: FloatArray  # (N,) l of the next token in the text

    def __len__(self) -> int:
        return len(self.gold_logprobs)

    def __getitem__(self, rows: slice | IntArray) -> Self:
        return replace(self, **{name: getattr(self, name)[rows] for name in self.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of its arrays."""
        return tuple(each.name for each in fields(cls))

    @staticmethod
    def concatenate(parts: Sequence["SparseTargets"]) -> "SparseTargets":
        """Return the rows of all parts, which are of one kind, in order."""
        kind = type(parts[0])
        return kind(*(np.concatenate([getattr(part, name) for part in parts]) for name in kind.names()))


@dataclass(frozen=True)
class ExactTargets(SparseTargets):
    """Labels whose tail is the teacher's own: no draws, but the hidden state that its head read, in few bits.

    ``cache.exact.head.decode`` gives the hidden states, (N, W).
    """

    codes: NDArray[np.integer[Any]]  # (N, C) coefficients of the hidden state in the basis of the cache, in steps
    steps: FloatArray  # (N,)
    tail_bias: FloatArray  # (N, J) of log p outside the head: how far it is above the teacher's, on average, in nats


@dataclass(frozen=True)
class Example:
    """One example: L tokens, N of which are followed by a labelled target."""

    input_ids: IntArray  # (L,)
    target_mask: NDArray[np.bool_]  # (L,) true at t where the distribution of token t + 1 is stored
    targets: SparseTargets  # N rows, in the order of the mask
    metadata: Mapping[str, int] = field(default_factory=dict)  # codes of its values in the manifest, by column


@dataclass(frozen=True)
class Shard:
    """E examples, concatenated."""

    token_count: IntArray  # (E,)
    position_count: IntArray  # (E,)
    input_ids: IntArray  # (sum of token_count,); its type may be narrower, as in the cache
    target_mask: NDArray[np.bool_]  # (sum of token_count,)
    targets: SparseTargets  # sum of position_count rows
    fidelity: FidelitySums | None = None  # the shard's row of the certificate; None if not measured, or not read
    metadata: Mapping[str, IntArray] = field(default_factory=dict)  # (E,) codes of values in the manifest, by column
    projection: NDArray[np.float64] | None = None  # (3,) sums of labels in another vocabulary; None if not read

    def __len__(self) -> int:
        return len(self.token_count)

    @staticmethod
    def of(
        examples: Sequence[Example],
        fidelity: FidelitySums | None = None,
        projection: NDArray[np.float64] | None = None,
    ) -> "Shard":
        """Return the shard of these examples, in order."""
        return Shard(
            token_count=np.array([len(example.input_ids) for example in examples], dtype=np.int64),
            position_count=np.array([len(example.targets) for example in examples], dtype=np.int64),
            input_ids=np.concatenate([example.input_ids for example in examples]),
            target_mask=np.concatenate([example.target_mask for example in examples]),
            targets=SparseTargets.concatenate([example.targets for example in examples]),
            fidelity=fidelity,
            projection=projection,
            metadata={
                name: np.array([example.metadata[name] for example in examples], dtype=np.int64)
                for name in examples[0].metadata
            },
        )

    def example(self, index: int) -> Example:
        """Return the example at an index of the shard."""
        tokens, rows = (slice(starts[index], starts[index + 1]) for starts in self._starts)
        metadata = {name: int(codes[index]) for name, codes in self.metadata.items()}
        return Example(self.input_ids[tokens].astype(np.int64), self.target_mask[tokens], self.targets[rows], metadata)

    @functools.cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """Offsets of each example's tokens and positions, followed by their totals."""
        tokens, positions = (np.cumsum(counts).tolist() for counts in (self.token_count, self.position_count))
        return [0, *tokens], [0, *positions]


@dataclass(frozen=True)
class SoftLabels(Generic[A]):
    """Sparse teacher probabilities at one temperature T, from the cache to the loss.

    ``soft_labels`` makes numpy arrays; a batch holds tensors (``map(torch.from_numpy)``). Not a tuple, because Trainer
    rebuilds tuples from a single generator; data loaders call ``to`` and ``pin_memory``.
    """

    ids: A  # (N, S)
    weights: A  # (N, S) sum_s weights * f(ids) estimates sum_v p_T(v) f(v); 0 is padding
    log_probs: A  # (N, S) log p_T of each entry, 0 where the weight is 0
    log_rest: A  # (N,) log of the mass outside the head at T
    head_size: int  # how many of the S entries, the first, are the head's
    temperature: float = 1.0  # T
    tail: str = "sampled"  # what the weights and ``log_rest`` stand for, see ``soft_labels``

    def map(self, function: Callable[[Any], B]) -> "SoftLabels[B]":
        """Apply a function to each of the four arrays."""
        ids, weights, log_probs, log_rest = map(function, (self.ids, self.weights, self.log_probs, self.log_rest))
        return SoftLabels(ids, weights, log_probs, log_rest, self.head_size, self.temperature, self.tail)

    def __getitem__(self, rows: slice) -> "SoftLabels[A]":
        return self.map(lambda array: array[rows])

    def to(self, device: Any, **options: Any) -> "SoftLabels[A]":
        """Move the tensors to a device."""
        return self.map(lambda tensor: tensor.to(device, **options))

    def pin_memory(self, *device: Any) -> "SoftLabels[A]":
        """Copy the tensors to page-locked memory."""
        return self.map(lambda tensor: tensor.pin_memory(*device))


def temperature_index(temperatures: Sequence[float], temperature: float, option: str = "--temperature") -> int:
    """Return the index of T among the stored temperatures. Raises LogitcaskError, naming them, if it is not stored.

    ``option`` is the one that it was given by.
    """
    for index, stored in enumerate(temperatures):
        if abs(stored - temperature) < 1e-6:
            return index
    stored_names = ", ".join(f"{stored:g}" for stored in temperatures)
    raise LogitcaskError(f"{option} {temperature:g} is not stored in the cache: it holds {stored_names}")


def soft_labels(
    targets: SparseTargets, temperatures: Sequence[float], temperature: float, tail: str
) -> SoftLabels[Array]:
    """Return the labels at one stored temperature. ``tail`` decides what represents the mass outside the head.

    ``sampled``: head weights p_T(v), tail weights (count / M) * p_T(v) / r(v), where r(v) = mean over stored t of
    p_t(v) / (tail mass at t) is the distribution of the draws; unbiased for every f. ``bucket``: head weights p_T(v);
    the rest is ``log_rest``. ``renormalize``: head weights rescaled to sum to 1; ignores the rest, biased.
    Raises LogitcaskError if the temperature is not stored.
    """
    j, k = temperature_index(temperatures, temperature), targets.head_ids.shape[1]
    n, m = targets.tail_ids.shape if tail == "sampled" else (len(targets), 0)
    ids = np.empty((n, k + m), dtype=np.int64)
    weights, log_probs = np.empty((n, k + m), dtype=np.float32), np.empty((n, k + m), dtype=np.float32)
    ids[:, :k], log_probs[:, :k] = targets.head_ids, _log_probs(targets, targets.head_logprobs, temperatures, j)
    np.exp(log_probs[:, :k], out=weights[:, :k])
    if tail == "renormalize":
        weights /= np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        log_probs = np.log(np.maximum(weights, np.finfo(np.float32).tiny))
    elif m:
        ids[:, k:], log_probs[:, k:] = targets.tail_ids, _log_probs(targets, targets.tail_logprobs, temperatures, j)
        weights[:, k:] = _tail_weights(targets, temperatures, j)
    np.copyto(log_probs[:, k:], 0, where=weights[:, k:] == 0)
    np.copyto(log_probs[:, :k], MASS_FLOOR, where=weights[:, :k] == 0)  # 0 would be a probability of 1
    return SoftLabels(
        ids=ids,
        weights=weights,
        log_probs=log_probs,
        log_rest=np.maximum(targets.log_tail_mass[:, j], np.float32(MASS_FLOOR)),
        head_size=k,
        temperature=float(temperatures[j]),
        tail=tail,
    )


def _log_probs(targets: SparseTargets, logprobs: FloatArray, temperatures: Sequence[float], j: int) -> FloatArray:
    """Return log p_t(v) = l(v) / t - A(t), in the shape of ``logprobs``."""
    log_probs: FloatArray = logprobs / np.float32(temperatures[j]) - targets.log_partition[:, j, None]
    return log_probs


def _tail_weights(targets: SparseTargets, temperatures: Sequence[float], j: int) -> FloatArray:
    """Return (count / M) * p_T / r, (N, M), computed as count / M * J / sum over t of p_t / (p_T * tail mass at t).

    Ratios of probabilities neither cancel nor vanish, however small the probabilities: tail masses may be 1e-30. If one
    overflows float32, the weight is 0, which is its true value in float32, or there is no tail.
    """
    shape = targets.tail_logprobs.shape
    level = targets.log_partition[:, j, None] - targets.log_partition - targets.log_tail_mass
    with np.errstate(over="ignore"):
        inverse = np.full(shape, np.exp(level[:, j, None]), order="F")
        for i in (i for i in range(len(temperatures)) if i != j):
            ratio = targets.tail_logprobs * np.float32(1 / temperatures[i] - 1 / temperatures[j])
            ratio += level[:, i, None]
            inverse += np.exp(ratio, out=ratio)
    weights: FloatArray = targets.tail_counts * np.float32(len(temperatures) / shape[1])
    weights /= inverse
    return weights
