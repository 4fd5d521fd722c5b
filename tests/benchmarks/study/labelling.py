"""The sparse labels of the study, made of exact ones by Logitcask's own functions."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.labels import IntArray, SparseTargets
from logitcask.cache.layout import array_specs, decode_targets, encode_targets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.teachers.labelling import label_rows
from logitcask.pipeline.teachers.sparsify import uniform_draws
from tests.benchmarks.study import ideas
from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.labels import BLOCK, Stored, TeacherFolder

ROWS = POSITIONS  # at a time


def label_windows(where: TeacherFolder, vocabulary: int, part: tuple[int, int]) -> None:
    """Make the labels that windows of part i of n lack."""
    for block in range(part[0], where.blocks, part[1]):
        missing = where.missing(block)
        if not missing:
            continue
        windows = slice(block * BLOCK, min((block + 1) * BLOCK, len(where.ids)))
        with torch.inference_mode():
            for first in range(windows.start * POSITIONS, windows.stop * POSITIONS, ROWS):
                logits = where.exact.log_probs(np.arange(first, first + ROWS), 1.0)
                label_rows_of(where, logits, vocabulary, slice(first, first + ROWS), missing)
        for name in missing:
            where.done[name][block] = True
        print(f"{where.folder.name}: block {block} of {where.blocks} labelled", flush=True)


def label_rows_of(where: TeacherFolder, logits_NV: Tensor, vocabulary: int, rows: slice, names: Sequence[str]) -> None:
    """Write the labels ``names`` of some rows from the teacher's logits."""
    gold_N = where.ids[:, 1:].reshape(-1)[rows]
    redrawn = rows.start < where.rows // ideas.SETS  # windows of the runs with several epochs
    for name, how in where.stored.items():
        if name not in names or (how.seed and not redrawn):
            continue
        uniforms_NM = uniform_draws(how.seed, rows.start, len(gold_N), how.draws)
        if how.numbers == "by need":
            where.put(name, rows, by_need(logits_NV, gold_N, uniforms_NM, how, vocabulary))
            continue
        if how.numbers == "stratified":
            uniforms_NM = ideas.stratified(uniforms_NM)
        where.put(name, rows, drawn(logits_NV, gold_N, uniforms_NM, how.settings(vocabulary)))


def drawn(logits_NV: Tensor, gold_N: IntArray, uniforms_NM: NDArray[np.float64], label: LabelSettings) -> SparseTargets:
    """Return labels made by Logitcask's functions, as they are read back from a cache."""
    unmeasured = np.zeros(len(gold_N), dtype=np.bool_)
    targets, _ = label_rows(
        lambda logits: logits, logits_NV, gold_N, uniforms_NM, unmeasured, label, None, len(logits_NV)
    )
    return through_codes(targets, label)


def by_need(
    logits_NV: Tensor, gold_N: IntArray, uniforms_NM: NDArray[np.float64], how: Stored, vocabulary: int
) -> SparseTargets:
    """Return labels with more draws for larger tails: each position uses its first ones of ``uniforms_NM``."""
    top = logits_NV.topk(how.head, dim=1).values
    tail_mass_N = -torch.expm1(top.logsumexp(1) - logits_NV.logsumexp(1))
    sizes_N = ideas.sizes_by_need(tail_mass_N).numpy()
    parts, places = [], []
    for draws in ideas.SIZES:
        at = np.flatnonzero(sizes_N == draws)
        if len(at):
            settings = how.settings(vocabulary).model_copy(update={"tail_draws": draws})
            found = drawn(logits_NV[torch.from_numpy(at)], gold_N[at], uniforms_NM[at, :draws], settings)
            parts.append(ideas.widened(found, how.draws))
            places.append(at)
    return SparseTargets.concatenate(parts)[np.argsort(np.concatenate(places))]


def through_codes(targets: SparseTargets, label: LabelSettings) -> SparseTargets:
    """Return labels as they are read back from a cache."""
    coded = encode_targets(targets)
    kept = {s.name: coded[s.name].astype(s.dtype) for s in array_specs(label) if s.axis == "position"}
    return decode_targets(kept, label)
