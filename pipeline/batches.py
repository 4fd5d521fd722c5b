"""Cache to training batches: which examples make a batch, and what a batch holds.

Legend: B examples a batch, L their padded length, N target positions of the batch, S label entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cache.local_copies import LocalCopies
from cache.reader import CacheReader
from cache.soft_labels import soft_labels
from cache.targets import IntArray, SparseTargets
from pipeline.examples import Encoded
from pipeline.token_table import TokenTable

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingExample:
    """Tokens (L,), target mask (L,) and, where the loss has a soft part, the labels of the mask's positions."""

    encoded: Encoded
    targets: SparseTargets | None


class CacheExamples(Dataset[TrainingExample]):
    """The examples of a cache, opened lazily so that worker processes open it for themselves."""

    def __init__(self, path: str, *, with_targets: bool, kept: LocalCopies | None = None) -> None:
        self._path, self._with_targets, self._kept = path, with_targets, kept
        self._reader: CacheReader | None = None

    @property
    def reader(self) -> CacheReader:
        """The open cache."""
        if self._reader is None:
            self._reader = CacheReader(self._path, kept=self._kept)
        return self._reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> TrainingExample:
        found = self.reader.example(index)
        return TrainingExample(
            Encoded(found.input_ids, found.target_mask), found.targets if self._with_targets else None
        )

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_with_targets": self._with_targets, "_kept": self._kept, "_reader": None}


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
    """

    def __init__(
        self, shard_starts: IntArray, left_out: IntArray, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        kept = np.ones(int(shard_starts[-1]), dtype=bool)
        kept[left_out] = False
        self._starts, self._kept = shard_starts, kept
        self.left_out: list[int] = left_out.tolist()
        self._seed, self._epoch = seed, 0
        self.batch_size, self.drop_last = batch_size, False
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

    def step_examples(self, step: int, accumulation: int) -> list[int]:
        """The examples of an optimizer step of all ranks; steps are counted from 0 over all epochs."""
        epoch, place = divmod(step, -(-len(self) // accumulation))
        size = self._stride * accumulation
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
        return np.concatenate(parts)


@dataclass(frozen=True)
class Collator:
    """Examples to the tensors of one batch; soft labels are brought to the temperature of training here."""

    pad_id: int
    temperatures: tuple[float, ...]
    temperature: float
    tail: str

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        """input_ids (B, L), padded at the right; target_index (N,) into the flattened batch; gold (N,); label tensors.

        There is no padding mask: attention is causal, so no real token sees the padding after it.
        """
        longest = max((len(example.encoded.input_ids) for example in examples), default=1)
        ids = np.full((max(1, len(examples)), longest), self.pad_id, dtype=np.int64)  # no examples: one of no targets
        mask = np.zeros(ids.shape, dtype=bool)
        for row, example in enumerate(examples):
            length = len(example.encoded.input_ids)
            ids[row, :length] = example.encoded.input_ids
            mask[row, :length] = example.encoded.target_mask
        index = np.flatnonzero(mask)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "target_index": torch.from_numpy(index),
            "gold": torch.from_numpy(ids.reshape(-1)[index + 1]),
        }
        parts = [example.targets for example in examples if example.targets is not None]
        if parts:
            soft = soft_labels(SparseTargets.concatenate(parts), self.temperatures, self.temperature, self.tail)
            batch["label_ids"] = torch.from_numpy(soft.ids)
            batch["label_weights"] = torch.from_numpy(soft.weights)
            batch["label_log_probs"] = torch.from_numpy(soft.log_probs)
            batch["label_log_rest"] = torch.from_numpy(soft.log_rest)
        return batch
