"""The teacher's part of the study: its hidden states and every sparse label of the same positions, on disk.

Hidden states are kept so that exact distillation needs no second pass of the teacher; labels come from the product's
``sparsify`` and go through the codes of its cache. One row a target position; blocks of windows are done in any order,
by any number of processes, each once.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cache.layout import array_specs, decode_targets, encode_targets
from cache.manifest import LabelSettings
from cache.soft_labels import SoftLabels, soft_labels
from cache.targets import IntArray, SparseTargets
from pipeline.labelling import label_rows
from pipeline.lm_head import last_hidden_states, read_head
from pipeline.losses import SparseLabels
from pipeline.settings import PRESETS
from pipeline.sparsify import uniform_draws
from tests.benchmarks.study.corpus import LENGTH

POSITIONS = LENGTH - 1  # of a window
BLOCK = 8  # windows at a time
ROWS = 255  # target positions at a time


@dataclass(frozen=True)
class Stored:
    """A label as it is drawn: K, M and the temperatures it is drawn for."""

    head: int
    draws: int
    temperatures: tuple[float, ...]

    def settings(self, vocabulary: int) -> LabelSettings:
        """For the cache's codes."""
        return LabelSettings(
            vocab_size=vocabulary,
            head_size=self.head,
            tail_draws=self.draws,
            temperatures=list(self.temperatures),
            seed=0,
        )


DEFAULT = (1.0, 1.5, 2.0)
STORED = {
    "lean": Stored(*PRESETS["lean"], DEFAULT),
    "standard": Stored(*PRESETS["standard"], DEFAULT),
    "random": Stored(0, 32, (1.0,)),  # random-sampling KD: as many slots as standard, drawn from the teacher at T=1
    "top": Stored(64, 0, (1.0, 2.0)),
}


@dataclass(frozen=True)
class Way:
    """How a student uses a label: which, how many of the head, and what becomes of the rest."""

    stored: str
    tail: str
    head: int | None = None


WAYS = {
    "standard": Way("standard", "sampled"),
    "lean": Way("lean", "sampled"),
    "standard bucket": Way("standard", "bucket"),
    "top-64 renormalised": Way("top", "renormalize"),
    "top-12 renormalised": Way("top", "renormalize", 12),
    "top-64 bucket": Way("top", "bucket"),
    "random sampling, 32": Way("random", "sampled"),
}


class TeacherFolder:
    """Hidden states (rows, width), labels and tokens of some windows, memory-mapped in a folder."""

    def __init__(self, folder: Path, ids: IntArray, width: int, stored: dict[str, Stored]) -> None:
        self.ids, self.folder, self.stored = ids, folder, stored
        rows = len(ids) * POSITIONS
        self.hidden = self._array("hidden", (rows, width), np.float32)
        self.done = self._array("done", (-(-len(ids) // BLOCK),), np.bool_)
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

    def targets(self, name: str, rows: IntArray | slice) -> SparseTargets:
        """Labels of some rows."""
        found = {field: np.asarray(values[rows]) for field, values in self._fields[name].items()}
        wide: dict[str, Any] = {
            field: v.astype(np.int64 if v.dtype.kind == "i" else np.float32) for field, v in found.items()
        }
        return SparseTargets(**wide)

    def put(self, name: str, rows: slice, targets: SparseTargets) -> None:
        """Keep labels of some rows."""
        for field in fields(SparseTargets):
            self._fields[name][field.name][rows] = getattr(targets, field.name)


def _shape(field: str, how: Stored, rows: int) -> tuple[tuple[int, ...], type[np.generic]]:
    kind: type[np.generic] = np.int32 if field.endswith(("ids", "counts")) else np.float32
    if field == "gold_logprobs":
        return (rows,), kind
    width = how.head if field.startswith("head") else how.draws if field.startswith("tail") else len(how.temperatures)
    return (rows, width), kind


def label_windows(where: TeacherFolder, model: PreTrainedModel, vocabulary: int, part: tuple[int, int]) -> None:
    """Run the teacher over the windows of part i of n that are not done yet."""
    head = read_head(model)
    for block in range(part[0], len(where.done), part[1]):
        if where.done[block]:
            continue
        windows = slice(block * BLOCK, min((block + 1) * BLOCK, len(where.ids)))
        rows = slice(windows.start * POSITIONS, windows.stop * POSITIONS)
        ids = torch.from_numpy(where.ids[windows])
        with torch.inference_mode():
            hidden = last_hidden_states(model, ids)[:, :-1].reshape(-1, where.hidden.shape[1])
            where.hidden[rows] = hidden.numpy()
            for first in range(rows.start, rows.stop, ROWS):
                here = slice(first, min(first + ROWS, rows.stop))
                _label(where, head.logits(hidden[here.start - rows.start : here.stop - rows.start]), vocabulary, here)
        where.done[block] = True
        print(f"{where.folder.name}: {int(where.done.sum())} of {len(where.done)} blocks labelled", flush=True)


def _label(where: TeacherFolder, logits_NV: Tensor, vocabulary: int, rows: slice) -> None:
    """Every label of some rows, from the teacher's logits."""
    gold = where.ids[:, 1:].reshape(-1)[rows]
    for name, how in where.stored.items():
        uniforms = uniform_draws(0, rows.start, len(gold), how.draws)
        settings, unmeasured = how.settings(vocabulary), np.zeros(len(gold), dtype=np.bool_)
        drawn, _ = label_rows(
            lambda logits: logits, logits_NV, gold, uniforms, unmeasured, settings, None, len(logits_NV)
        )
        where.put(name, rows, through_codes(drawn, settings))


def through_codes(targets: SparseTargets, label: LabelSettings) -> SparseTargets:
    """Labels as they come back from a cache."""
    coded = encode_targets(targets)
    kept = {s.name: coded[s.name].astype(s.dtype) for s in array_specs(label) if s.axis == "position"}
    return decode_targets(kept, label)


def entries(where: TeacherFolder, way: Way, rows: IntArray | slice, temperature: float) -> SparseLabels:
    """What the loss needs of some rows. A label drawn at T=1 alone is carried to T by p_T / p_1, still unbiased."""
    how, targets = where.stored[way.stored], shorter(where.targets(way.stored, rows), way.head)
    if temperature in how.temperatures:
        found = soft_labels(targets, how.temperatures, temperature, way.tail)
    else:
        partition = where.targets("top", rows).log_partition[:, where.stored["top"].temperatures.index(temperature)]
        log_p = np.where(targets.tail_counts > 0, targets.tail_logprobs / temperature - partition[:, None], 0.0)
        weights = targets.tail_counts / how.draws * np.exp(log_p - targets.tail_logprobs)
        none = np.zeros(len(targets), dtype=np.float32)
        found = SoftLabels(targets.tail_ids, weights.astype(np.float32), log_p.astype(np.float32), none, 0)
    return SparseLabels(
        ids_NS=torch.from_numpy(found.ids),
        weights_NS=torch.from_numpy(found.weights),
        log_probs_NS=torch.from_numpy(found.log_probs),
        log_rest_N=torch.from_numpy(found.log_rest),
        head_size=found.head_size,
    )


def shorter(targets: SparseTargets, head: int | None) -> SparseTargets:
    """The first ``head`` of the head alone, for a use that ignores the rest; all of it for None."""
    values = {field.name: getattr(targets, field.name) for field in fields(SparseTargets)}
    values |= {name: values[name][:, :head] for name in ("head_ids", "head_logprobs")}
    return SparseTargets(**values)
