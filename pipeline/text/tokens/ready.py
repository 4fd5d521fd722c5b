"""Records that are token ids already."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray
from logitcask.pipeline.text.columns import RecordError

Row = tuple[IntArray, NDArray[np.bool_]]  # token ids (L,) and the target mask (L,)
IGNORED_LABEL = -100


def ready_rows(tokens: Mapping[str, Any], vocab_size: int) -> list[Row]:
    """Return the rows of a record of token ids: its ``labels`` are -100, or its ``target_mask`` 0, off targets.

    A row that was packed is cut by ``seq_lengths``, or where its ``position_ids`` start again. Raises RecordError if
    the fields do not fit each other or the vocabulary.
    """
    ids = _integers(tokens, "input_ids")
    name = "labels" if "labels" in tokens else "target_mask"
    marks = _integers(tokens, name)
    if len(marks) != len(ids):
        raise RecordError(f"{name} must have as many entries as input_ids, {len(ids)}, got {len(marks)}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise RecordError(f"input_ids must be from 0 to {vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}")
    if name == "target_mask" and not np.isin(marks, (0, 1)).all():
        raise RecordError("target_mask must hold 0 and 1 alone")
    targets = marks != (IGNORED_LABEL if name == "labels" else 0)
    if name == "labels" and (marks[targets] != ids[targets]).any():
        raise RecordError("labels must be -100 or equal to input_ids at the same place")
    cuts = _row_borders(tokens, len(ids))
    rows = list[Row]()
    for start, stop in itertools.pairwise(cuts):
        mask = np.zeros(stop - start, dtype=bool)
        mask[:-1] = targets[start + 1 : stop]
        rows.append((ids[start:stop], mask))
    return [row for row in rows if row[1].any()] or rows[:1]


def _row_borders(tokens: Mapping[str, Any], length: int) -> list[int]:
    if "seq_lengths" in tokens:
        lengths = _integers(tokens, "seq_lengths")
        if int(lengths.min()) < 1 or int(lengths.sum()) != length:
            raise RecordError(f"seq_lengths must be positive and sum to the number of input_ids, {length}")
        return [0, *map(int, np.cumsum(lengths))]
    if "position_ids" in tokens:
        positions = _integers(tokens, "position_ids")
        if len(positions) != length:
            raise RecordError(f"position_ids must have {length} entries, got {len(positions)}")
        if positions[0] != 0:
            raise RecordError(f"position_ids must start at 0, got {int(positions[0])}")
        if (np.diff(positions) != 1)[positions[1:] != 0].any():
            raise RecordError("position_ids must count up by 1 from each 0, as the teacher numbers the tokens of a row")
        return [*map(int, np.flatnonzero(positions == 0)), length]
    return [0, length]


def _integers(tokens: Mapping[str, Any], name: str) -> IntArray:
    values = np.asarray(tokens[name])
    if values.ndim != 1 or values.dtype.kind not in "iub" or not len(values):
        raise RecordError(f"{name} must be a list of integers that is not empty")
    return values.astype(np.int64)
