"""The study's teacher: a cache of exact labels of some windows, of the product, of which all else is computed.

The teacher runs once. Exact distillation, held-out divergences and sparse labels take its distributions from the cache,
in the finest code there is. What that code is off by, its certificate says; docs/results/study-in-full.md has it.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcask.cache.labels import ExactTargets, IntArray
from logitcask.cache.reader import CacheReader, is_complete
from logitcask.pipeline.batches.collate import exact_labels
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.models.dense.rows import CodedHead, ExactRows, log_probs
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from tests.benchmarks.study.corpus import LENGTH, POSITIONS

FINEST = {"preset": "exact", "hidden_bits": 8, "temperatures": "1,1.5,2,3"}
KEPT_BYTES = 2 << 30  # of decoded labels: batches are of windows from anywhere
CPU = torch.device("cpu")


def make(place: Path, teacher: str, ids: IntArray, how: Mapping[str, Any] = FINEST) -> None:
    """Label windows (windows, L), or resume that, by some settings of stage 1."""
    if is_complete(place):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    data = place.with_suffix(".jsonl")
    if not data.exists():
        partial = data.with_suffix(".part")
        partial.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in ids.tolist()))
        partial.replace(data)
    values = {"teacher_model": teacher, "train_data": str(data), "device": "cpu", "max_seq_length": LENGTH, **how}
    precompute(PrecomputeSettings.model_validate({**values, "output": place}))


class ExactTeacher:
    """The teacher's distributions over the target positions of windows (windows, L), one row each.

    A cache has its examples in an order of its own.
    """

    def __init__(self, place: Path, ids: IntArray) -> None:
        self._reader = CacheReader(place, kept_bytes=KEPT_BYTES)
        self._reader.keep(self._reader.manifest.shards.count)
        self._head = StoredHead(((self._reader.path, self._reader.opened),))
        cached = {self._reader.example(i).input_ids.tobytes(): i for i in range(len(self._reader))}
        assert {row.tobytes() for row in ids} <= {*cached}, f"{place} is of another study: remove it"
        self._examples = [cached[row.tobytes()] for row in ids]

    def rows(self, rows: IntArray, temperature: float, dtype: torch.dtype = torch.float32) -> ExactRows:
        """Return the distributions of some rows, for the loss."""
        windows, places = np.divmod(rows, POSITIONS)
        cuts = np.flatnonzero(np.diff(windows)) + 1
        parts = []
        for window, place in zip(np.split(windows, cuts), np.split(places, cuts), strict=True):
            targets = self._reader.example(self._examples[window[0]]).targets[place]
            assert isinstance(targets, ExactTargets)
            parts.append((targets, 0))
        stored = tuple(self._reader.manifest.label.temperatures)
        found = exact_labels(parts, [stored], stored, temperature, parts[0][0].head_ids.shape[1], self._head)
        if dtype == torch.float64:
            return ExactRows(found.map(torch.from_numpy).map(_precise), self._precise_head)
        return found.map(torch.from_numpy).rows(CPU)

    def log_probs(self, rows: IntArray, temperature: float) -> Tensor:
        """Return log p_T of some rows, (rows, V); at T=1 they are logits, too."""
        return log_probs(self.rows(rows, temperature), slice(None), temperature)

    @cached_property
    def _precise_head(self) -> CodedHead:
        coded = self._head(CPU)
        assert coded.head.bias is None, "the study's teachers have none"
        head = LMHead(coded.head.weight.double(), None, coded.head.scale, coded.head.softcap)
        return CodedHead(head, coded.bases_SCW.double(), coded.centres_SW.double())


def _precise(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values
