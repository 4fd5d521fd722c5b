"""Cache to training batches: which examples make a batch, and what a batch holds.

Legend: B examples a batch, R rows they lie in, L the rows' length, N target positions of the batch, S label entries.
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

Batch = dict[str, Any]  # of tensors, and SoftLabels of tensors
GROUP = 64  # steps


@dataclass(frozen=True)
class TrainingExample:
    """Tokens (L,), target mask (L,) and, where the loss has a soft part, the labels of the mask's positions."""

    encoded: Encoded
    targets: SparseTargets | None


class CacheExamples(Dataset[TrainingExample]):
    """The examples of a cache, opened lazily so that worker processes open it for themselves."""

    def __init__(self, path: str, *, with_targets: bool, disk_cache: DiskCache | None = None) -> None:
        self._path, self._with_targets, self._disk_cache = path, with_targets, disk_cache
        self._reader: CacheReader | None = None

    @property
    def reader(self) -> CacheReader:
        """The open cache."""
        if self._reader is None:
            self._reader = CacheReader(self._path, disk_cache=self._disk_cache)
        return self._reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> TrainingExample:
        found = self.reader.example(index)
        return TrainingExample(
            Encoded(found.input_ids, found.target_mask), found.targets if self._with_targets else None
        )

    def __getstate__(self) -> dict[str, object]:
        return {
            "_path": self._path,
            "_with_targets": self._with_targets,
            "_disk_cache": self._disk_cache,
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
    """Examples kept for evaluation, ascending: a share of them, chosen by seed, at least one unless it is 0."""
    if fraction == 0.0:
        return np.zeros(0, dtype=np.int64)
    count = min(examples - 1, max(1, round(examples * fraction)))
    return np.sort(np.random.default_rng([seed, 1]).permutation(examples)[:count])


class BatchSampler(Sampler[list[int]]):
    """Batches of one epoch: in cache order first (it is random already), later shards are shuffled, then examples
    within them. Depends on the data, the settings and the epoch only.

    With several ranks each step takes ``ranks`` batches that follow one another, and this rank the one of its number;
    in the last step some may be short or empty. So every example comes once an epoch, and a step is that of one rank
    with a batch as large as all of theirs.

    With ``lengths`` (tokens of each example) optimizer steps, of ``accumulation`` such steps, are of examples of about
    one length: those of ``GROUP`` steps that follow one another are sorted by length, and the steps then shuffled.
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
        kept = np.ones(int(shard_starts[-1]), dtype=bool)
        kept[left_out] = False
        self._starts, self._kept, self._lengths = shard_starts, kept, lengths
        self.left_out: list[int] = left_out.tolist()
        self._seed, self._epoch = seed, 0
        self.batch_size, self.drop_last = batch_size, False
        self._together = ranks * batch_size * accumulation  # examples of an optimizer step
        self._first, self._stride = rank * batch_size, ranks * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-int(self._kept.sum()) // self._stride)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch)
        for step in range(0, len(order), self._stride):
            first = step + self._first
            yield order[first : first + self.batch_size].tolist()

    def step_examples(self, step: int) -> list[int]:
        """The examples of an optimizer step of all ranks; steps are counted from 0 over all epochs."""
        size = self._together
        epoch, place = divmod(step, -(-int(self._kept.sum()) // size))
        found: list[int] = self._order(epoch)[place * size : (place + 1) * size].tolist()
        return found

    def _order(self, epoch: int) -> IntArray:
        shards = np.arange(len(self._starts) - 1)
        random = np.random.default_rng([self._seed, 2, epoch])
        if epoch:
            random.shuffle(shards)
        parts = []
        for shard in shards:
            part = np.arange(self._starts[shard], self._starts[shard + 1])[
                self._kept[self._starts[shard] : self._starts[shard + 1]]
            ]
            if epoch:
                random.shuffle(part)
            parts.append(part)
        order = np.concatenate(parts)
        return order if self._lengths is None else self._grouped(order, self._lengths, random)

    def _grouped(self, order: IntArray, lengths: IntArray, random: np.random.Generator) -> IntArray:
        """The short step at the end, if there is one, stays there."""
        size = self._together
        whole = len(order) // size
        for first in range(0, whole, GROUP):
            part = order[first * size : min(first + GROUP, whole) * size]
            steps = part[np.argsort(lengths[part], kind="stable")].reshape(-1, size)
            part[:] = random.permutation(steps).reshape(-1)
        return order


def pack_first_fit_decreasing(lengths: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Row and start of each example in rows of ``room`` tokens: longest first, each in the first row it fits."""
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
    """Examples to the tensors of one batch; soft labels are brought to the temperature of training here."""

    pad_id: int
    temperatures: tuple[float, ...]
    temperature: float
    tail: str
    packed: bool = False  # several examples in a row, told apart by position_ids

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        """input_ids (R, L), padded at the right; target_index (N,) into the flattened batch; gold (N,); soft_labels
        of N rows; where examples share rows, position_ids (R, L), which begin at 0 with each of them.

        There is no padding mask: attention is causal, so no real token sees the padding after it.
        """
        lengths = [len(example.encoded.input_ids) for example in examples] or [1]  # no examples: a row of no targets
        rows, starts = (
            pack_first_fit_decreasing(lengths, max(lengths))
            if self.packed
            else (list(range(len(lengths))), [0] * len(lengths))
        )
        ids = np.full((max(rows) + 1, max(lengths)), self.pad_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        index = [np.zeros(0, dtype=np.int64)]
        for example, row, start, length in zip(examples, rows, starts, lengths, strict=False):
            ids[row, start : start + length] = example.encoded.input_ids
            positions[row, start : start + length] = np.arange(length)
            index.append(row * ids.shape[1] + start + np.flatnonzero(example.encoded.target_mask))
        at = np.concatenate(index)
        slots = np.array([sum(lengths) if examples else 0, ids.size])  # tokens, and room for them
        batch: Batch = {
            "input_ids": torch.from_numpy(ids),
            "target_index": torch.from_numpy(at),
            "gold": torch.from_numpy(ids.reshape(-1)[at + 1]),
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
    """Whether every number of a batch's labels is finite; true of a batch without labels."""
    labels = batch.get("soft_labels")
    parts = [] if labels is None else [labels.weights, labels.log_probs, labels.log_rest]
    return all(bool(part.isfinite().all()) for part in parts)
