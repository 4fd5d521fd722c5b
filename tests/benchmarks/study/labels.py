"""The labels of the study: exact ones in a cache (exact.py), and every sparse label of the same positions, on disk.

Sparse labels are made of the exact ones by the product's ``sparsify`` and go through the codes of its cache
(labelling.py). One row a target position; blocks of windows are done in any order, by any number of processes, each
once; a label that is new needs no second pass of the teacher.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.labels import IntArray, SoftLabels, SparseTargets, soft_labels
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import is_complete
from logitcask.pipeline.settings.precompute import PRESETS
from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.exact import ExactTeacher, make

BLOCK = 8  # windows at a time


@dataclass(frozen=True)
class Stored:
    """How a label is drawn: K, M (the maximum if it varies), the temperatures it is drawn for, seed, random numbers."""

    head: int
    draws: int
    temperatures: tuple[float, ...]
    seed: int = 0
    numbers: str = "independent"  # or stratified, by need: see ideas.py

    def settings(self, vocabulary: int) -> LabelSettings:
        """Return the label settings for the cache's codes."""
        return LabelSettings(
            vocab_size=vocabulary,
            head_size=self.head,
            tail_draws=self.draws,
            temperatures=list(self.temperatures),
            seed=self.seed,
        )


DEFAULT = (1.0, 1.5, 2.0)
STORED = {
    "lean": Stored(*PRESETS["lean"], DEFAULT),
    "standard": Stored(*PRESETS["standard"], DEFAULT),
    "random": Stored(0, 32, (1.0,)),  # random-sampling KD: as many slots as standard, drawn from the teacher at T=1
    "top": Stored(64, 0, (1.0, 2.0)),
}
LARGER = {"middle": Stored(16, 48, DEFAULT), "rich": Stored(*PRESETS["rich"], DEFAULT)}  # of the second teacher


@dataclass(frozen=True)
class Way:
    """How a student uses a label: which one, how much of the head, and how it treats the rest."""

    stored: str
    tail: str
    head: int | None = None


MIDDLE = "head 16 + tail 48"
WAYS = {
    "standard": Way("standard", "sampled"),
    "lean": Way("lean", "sampled"),
    MIDDLE: Way("middle", "sampled"),
    "rich": Way("rich", "sampled"),
    "standard bucket": Way("standard", "bucket"),
    "top-64 renormalised": Way("top", "renormalize"),
    "top-12 renormalised": Way("top", "renormalize", 12),
    "top-64 bucket": Way("top", "bucket"),
    "random sampling, 32": Way("random", "sampled"),
}


class TeacherFolder:
    """Labels and tokens of some windows in a folder: exact labels in a cache, sparse ones memory-mapped."""

    def __init__(self, folder: Path, ids: IntArray, stored: dict[str, Stored]) -> None:
        self.ids, self.folder, self.stored = ids, folder, stored
        rows = self.rows = len(ids) * POSITIONS
        self.blocks = -(-len(ids) // BLOCK)
        self.done = {name: self._array(f"{name}.done", (self.blocks,), np.bool_) for name in stored}
        self._fields = {
            name: {
                field.name: self._array(f"{name}.{field.name}", *_shape(field.name, how, rows))
                for field in fields(SparseTargets)
            }
            for name, how in stored.items()
        }

    def _array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        path = self.folder / f"{name}.npy"
        if 0 in shape:
            return np.zeros(shape, dtype=dtype)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return np.lib.format.open_memmap(path, "w+", dtype, shape)
        found: NDArray[np.generic] = np.lib.format.open_memmap(path, "r+")
        assert found.shape == shape, f"{path} is of another study: remove {self.folder}"
        return found

    def run(self, teacher: str) -> None:
        """Make the exact labels, unless they are there."""
        make(self.folder / "exact", teacher, self.ids)

    @cached_property
    def exact(self) -> ExactTeacher:
        """The teacher, from the exact labels."""
        return ExactTeacher(self.folder / "exact", self.ids)

    def missing(self, block: int) -> list[str]:
        """Return the sparse labels that a block lacks."""
        return [name for name, done in self.done.items() if not done[block]]

    def labelled(self) -> Self:
        """Return this folder; exit if not all windows are labelled, since their labels would be zeros."""
        done, of = sum(not self.missing(block) for block in range(self.blocks)), self.blocks
        done = done if is_complete(self.folder / "exact") else 0
        if done < of:
            raise SystemExit(f"{self.folder}: {done} of {of} blocks are labelled: `just study labels` does the rest")
        return self

    def targets(self, name: str, rows: IntArray | slice) -> SparseTargets:
        """Return the labels of some rows."""
        found = {field: np.asarray(values[rows]) for field, values in self._fields[name].items()}
        wide: dict[str, Any] = {
            field: v.astype(np.int64 if v.dtype.kind == "i" else np.float32) for field, v in found.items()
        }
        return SparseTargets(**wide)

    def put(self, name: str, rows: slice, targets: SparseTargets) -> None:
        """Store the labels of some rows."""
        for field in fields(SparseTargets):
            self._fields[name][field.name][rows] = getattr(targets, field.name)


def _shape(field: str, how: Stored, rows: int) -> tuple[tuple[int, ...], type[np.generic]]:
    kind: type[np.generic] = np.int32 if field.endswith(("ids", "counts")) else np.float32
    if field == "gold_logprobs":
        return (rows,), kind
    width = how.head if field.startswith("head") else how.draws if field.startswith("tail") else len(how.temperatures)
    return (rows, width), kind


def entries(where: TeacherFolder, way: Way, rows: IntArray | slice, temperature: float) -> SoftLabels[Tensor]:
    """Return what the loss needs of some rows. A label drawn only at T=1 is reweighted by p_T / p_1: still unbiased."""
    how, targets = where.stored[way.stored], shorter(where.targets(way.stored, rows), way.head)
    if temperature in how.temperatures:
        found = soft_labels(targets, how.temperatures, temperature, way.tail)
        if how.numbers == "by need":  # M differs by row
            found.weights[:, how.head :] *= how.draws / targets.tail_counts.sum(1, keepdims=True).clip(1)
    else:
        partition = where.targets("top", rows).log_partition[:, where.stored["top"].temperatures.index(temperature)]
        log_p = np.where(targets.tail_counts > 0, targets.tail_logprobs / temperature - partition[:, None], 0.0)
        weights = targets.tail_counts / how.draws * np.exp(log_p - targets.tail_logprobs)
        none = np.zeros(len(targets), dtype=np.float32)
        found = SoftLabels(targets.tail_ids, weights.astype(np.float32), log_p.astype(np.float32), none, 0)
    return found.map(torch.from_numpy)


def shorter(targets: SparseTargets, head: int | None) -> SparseTargets:
    """Return labels cut to the first ``head`` of the head, for uses that ignore the rest; None keeps all of it."""
    values = {field.name: getattr(targets, field.name) for field in fields(SparseTargets)}
    values |= {name: values[name][:, :head] for name in ("head_ids", "head_logprobs")}
    return SparseTargets(**values)
