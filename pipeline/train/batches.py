"""From a cache to training batches: which examples make a batch, and what a batch holds.

Legend: R rows of a batch, L tokens per row, N target positions of the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from logitcask.cache.labels import IntArray, SparseTargets, soft_labels
from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.text.examples import Encoded
from logitcask.pipeline.text.token_table import TokenTable

Batch = dict[str, Any]  # tensors by name, and SoftLabels of tensors
GROUP = 64  # optimizer steps whose examples are sorted by length together


@dataclass(frozen=True)
class TrainingExample:
    """Tokens (L,), target mask (L,) and, if the loss has a soft part, the labels of the mask's positions."""

    encoded: Encoded
    targets: SparseTargets | None


class CacheExamples(Dataset[TrainingExample]):
    """The examples of a cache, which each worker process opens for itself at its first read."""

    def __init__(
        self,
        path: str,
        *,
        with_targets: bool,
        disk_cache: DiskCache | None = None,
        opened: bytes | None = None,
        chosen: IntArray | None = None,
    ) -> None:
        """Take the ``chosen`` examples of the cache at a path, the one that another reader has ``opened`` if given."""
        self._path, self._with_targets, self._disk_cache, self._opened = path, with_targets, disk_cache, opened
        self._chosen = chosen
        self._reader: CacheReader | None = None

    @property
    def reader(self) -> CacheReader:
        """The open cache."""
        if self._reader is None:
            self._reader = CacheReader(self._path, disk_cache=self._disk_cache, opened=self._opened)
            self._opened = self._reader.opened
        return self._reader

    def __len__(self) -> int:
        return len(self.reader if self._chosen is None else self._chosen)

    def __getitem__(self, index: int) -> TrainingExample:
        example = self.reader.example(index if self._chosen is None else int(self._chosen[index]))
        encoded = Encoded(example.input_ids, example.target_mask)
        return TrainingExample(encoded, example.targets if self._with_targets else None)

    def __getstate__(self) -> dict[str, object]:
        return {
            "_path": self._path,
            "_with_targets": self._with_targets,
            "_disk_cache": self._disk_cache,
            "_opened": self._opened,
            "_chosen": self._chosen,
            "_reader": None,
        }


class FileExamples(Dataset[TrainingExample]):
    """The examples of a tokenized file, for output distillation without a cache."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TrainingExample:
        return TrainingExample(self._table.example(index), None)


def held_out(examples: int, fraction: float, seed: int) -> IntArray:
    """Return the examples kept for evaluation, ascending: a fraction chosen by seed, at least one unless it is 0."""
    if fraction == 0.0:
        return np.zeros(0, dtype=np.int64)
    count = min(examples - 1, max(1, round(examples * fraction)))
    return np.sort(np.random.default_rng([seed, 1]).permutation(examples)[:count])


class BatchSampler(Sampler[list[int]]):
    """Batches of one epoch, determined by the data, the settings and the epoch alone.

    Each epoch shuffles the shards, and the examples within each, by seed and epoch; but with seed 0 the first epoch
    follows the order of the cache, which is random already.

    With several ranks each step takes ``ranks`` consecutive batches, one per rank; in the last step some may be short
    or empty. Each example therefore occurs once per epoch, and a step equals that of a single rank whose batch is as
    large as all of theirs together.

    With ``lengths`` (tokens per example) the examples of an optimizer step (``accumulation`` such steps) are of similar
    length: those of ``GROUP`` consecutive optimizer steps are sorted by length, and then the steps are shuffled.
    """

    def __init__(
        self,
        shard_starts: IntArray,
        left_out: IntArray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        lengths: IntArray | None = None,
        accumulation: int = 1,
    ) -> None:
        included = np.ones(int(shard_starts[-1]), dtype=bool)
        included[left_out] = False
        self._starts, self._included, self._lengths = shard_starts, included, lengths
        self.left_out: list[int] = left_out.tolist()
        self._seed, self._epoch = seed, 0
        self.batch_size, self.drop_last = batch_size, False
        self._step_size = ranks * batch_size * accumulation  # examples per optimizer step
        self._first, self._stride = rank * batch_size, ranks * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-int(self._included.sum()) // self._stride)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch)
        for step in range(0, len(order), self._stride):
            first = step + self._first
            yield order[first : first + self.batch_size].tolist()

    def step_examples(self, step: int) -> list[int]:
        """Return the examples of an optimizer step on all ranks; steps count from 0 over all epochs."""
        size = self._step_size
        epoch, within = divmod(step, -(-int(self._included.sum()) // size))
        examples: list[int] = self._order(epoch)[within * size : (within + 1) * size].tolist()
        return examples

    def _order(self, epoch: int) -> IntArray:
        shards = np.arange(len(self._starts) - 1)
        random = np.random.default_rng([self._seed, 2, epoch])
        shuffled = epoch > 0 or self._seed != 0
        if shuffled:
            random.shuffle(shards)
        parts = []
        for shard in shards:
            part = np.arange(self._starts[shard], self._starts[shard + 1])[
                self._included[self._starts[shard] : self._starts[shard + 1]]
            ]
            if shuffled:
                random.shuffle(part)
            parts.append(part)
        order = np.concatenate(parts)
        return order if self._lengths is None else self._group_by_length(order, self._lengths, random)

    def _group_by_length(self, order: IntArray, lengths: IntArray, random: np.random.Generator) -> IntArray:
        """Sort the examples of each group of steps by length, then shuffle the steps; a short last step stays last."""
        size = self._step_size
        whole = len(order) // size
        for first in range(0, whole, GROUP):
            part = order[first * size : min(first + GROUP, whole) * size]
            steps = part[np.argsort(lengths[part], kind="stable")].reshape(-1, size)
            part[:] = random.permutation(steps).reshape(-1)
        return order


def pack_first_fit_decreasing(lengths: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Return row and start of each example: longest first, each into the first row of ``room`` tokens that fits."""
    used: list[int] = []
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, full in enumerate(used) if full + lengths[number] <= room), len(used))
        if row == len(used):
            used.append(0)
        rows[number], starts[number] = row, used[row]
        used[row] += lengths[number]
    return rows, starts


@dataclass(frozen=True)
class Collator:
    """Collates examples into the tensors of one batch, and brings soft labels to the training temperature."""

    pad_id: int
    temperatures: tuple[float, ...]
    temperature: float
    tail: str
    packed: bool = False  # several examples per row, separated by position_ids

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        """Return a batch: input_ids (R, L), padded on the right; target_index (N,) into the flattened rows; gold (N,);
        is_token (R, L), which places are not padding; slots (2,), the number of tokens and of the places R * L;
        soft_labels of N rows, if the examples have labels; position_ids (R, L), restarting at 0 with each example, if
        examples share rows.

        Attention needs no padding mask: it is causal, so no real token sees the padding after it.
        """
        lengths = [len(example.encoded.input_ids) for example in examples] or [1]  # no examples: a row without targets
        rows, starts = (
            pack_first_fit_decreasing(lengths, max(lengths))
            if self.packed
            else (list(range(len(lengths))), [0] * len(lengths))
        )
        ids = np.full((max(rows) + 1, max(lengths)), self.pad_id, dtype=np.int64)
        positions, is_token = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
        index = [np.zeros(0, dtype=np.int64)]
        for example, row, start, length in zip(examples, rows, starts, lengths, strict=False):
            ids[row, start : start + length] = example.encoded.input_ids
            positions[row, start : start + length] = np.arange(length)
            is_token[row, start : start + length] = True
            index.append(row * ids.shape[1] + start + np.flatnonzero(example.encoded.target_mask))
        target_index = np.concatenate(index)
        slots = np.array([sum(lengths) if examples else 0, ids.size])
        batch: Batch = {
            "input_ids": torch.from_numpy(ids),
            "target_index": torch.from_numpy(target_index),
            "gold": torch.from_numpy(ids.reshape(-1)[target_index + 1]),
            "is_token": torch.from_numpy(is_token),
            "slots": torch.from_numpy(slots),
        }
        if len(ids) < len(examples):
            batch["position_ids"] = torch.from_numpy(positions)
        parts = [example.targets for example in examples if example.targets is not None]
        if parts:
            soft = soft_labels(SparseTargets.concatenate(parts), self.temperatures, self.temperature, self.tail)
            batch["soft_labels"] = soft.map(torch.from_numpy)
        return batch


def labels_are_finite(batch: Batch) -> bool:
    """Return whether every number in a batch's labels is finite; True for a batch without labels."""
    labels = batch.get("soft_labels")
    parts = [] if labels is None else [labels.weights, labels.log_probs, labels.log_rest]
    return all(bool(part.isfinite().all()) for part in parts)
