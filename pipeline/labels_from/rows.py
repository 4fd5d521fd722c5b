"""What every format of labels is read into: a text, and rows of token ids with log-probabilities or logits.

Legend: L tokens of a text, N rows, K entries per row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import shown
from logitcask.cache.labels import FloatArray, IntArray
from logitcask.pipeline.text.columns import RecordError

LOWEST = -1e8  # a value at or below this marks an entry that is not there, as -inf does


@dataclass(frozen=True)
class LabelledText:
    """A text of L tokens and N rows of labels.

    Row n stands at token ``at[n]``; it is the distribution of the token ``offset`` places later, the same offset in the
    whole source (1: of the next token, 0: of the token itself).
    """

    input_ids: IntArray  # (L,)
    wanted: NDArray[np.bool_]  # (L,) which tokens are targets if a row is their distribution
    at: IntArray  # (N,) ascending
    ids: IntArray  # (N, K)
    values: FloatArray  # (N, K) log-probabilities or logits, in any order; -inf where there is no entry
    log_rest: FloatArray | None = None  # (N,) log of the probability outside the entries, if the source gives it
    slack: float = 0.25  # nats by which a row of log-probabilities may exceed certainty: coarse codes do
    bare: bool = False  # whether the source says that the probability outside the entries is unknown
    gold: FloatArray | None = None  # (N,) log-probability of the token a row is the distribution of; -inf: not given


Read = Callable[[Mapping[str, Any]], Iterable[LabelledText]]  # of a record; raises RecordError


def column(record: Mapping[str, Any], name: str) -> Any:
    """Return a column of a record. Raises RecordError, naming those that are there, if it is missing or null."""
    if record.get(name) is None:
        there = ", ".join(sorted(key for key, value in record.items() if value is not None))
        raise RecordError(f"no {name}: the columns are {there or 'none'}; name yours with --columns {name}=YOURS")
    return record[name]


def token_ids(record: Mapping[str, Any], name: str) -> IntArray:
    """Return a column of token ids, (L,). Raises RecordError if it is anything else."""
    return integers(column(record, name), name, 1)


def integers(values: Any, name: str, dimensions: int) -> IntArray:
    """Return whole numbers as an array of so many dimensions. Raises RecordError if they are anything else."""
    array = _array(values, name)
    if array.size == 0:
        return np.zeros((0,) * dimensions, dtype=np.int64)
    if array.ndim != dimensions or array.dtype.kind not in "iu":
        raise RecordError(f"{name}: must be whole numbers in {dimensions} dimensions")
    return array.astype(np.int64)


def floats(values: Any, name: str, rows: int) -> FloatArray:
    """Return one number per row, null as -inf. Raises RecordError if there is another number of them."""
    if isinstance(values, Sequence):
        values = [-np.inf if value is None else value for value in values]
    array = _array(values, name)
    if array.shape != (rows,) or array.dtype.kind not in "iuf":
        raise RecordError(f"{name}: must be one number for each of the {rows} rows")
    if np.isnan(array).any():
        raise RecordError(f"{name}: must be numbers, got nan")
    return array.astype(np.float32)


def entries(ids: Any, values: Any, names: tuple[str, str]) -> tuple[IntArray, FloatArray]:
    """Return the entries of all rows, (N, K) each; rows that are shorter than others, or null, are filled with -inf.

    Raises RecordError if the two do not fit each other, or hold anything but ids and numbers.
    """
    if not all(isinstance(rows, Sequence) and not isinstance(rows, str) for rows in (ids, values)):
        raise RecordError(f"{names[0]} and {names[1]}: must be lists of lists, one per position")
    if len(ids) != len(values):
        raise RecordError(f"{names[0]} has {len(ids)} rows, {names[1]} {len(values)}")
    widths = [0 if row is None else _length(row, names[1]) for row in values]
    for number, (row, width) in enumerate(zip(ids, widths, strict=True)):
        if (0 if row is None else _length(row, names[0])) != width:
            raise RecordError(f"{names[0]} and {names[1]} have different numbers of entries at position {number}")
    width = max(widths, default=0)
    whole = all(w == width for w in widths)
    filled = [values, ids] if whole else [_filled(values, width, -np.inf), _filled(ids, width, 0)]
    numbers, tokens = _array(filled[0], names[1]), _array(filled[1], names[0])
    if numbers.dtype == object:  # null: no entry, as minus infinity has no other form in JSON
        numbers = _array([[-np.inf if value is None else value for value in row] for row in filled[0]], names[1])
    if numbers.size == 0:
        return np.zeros((len(ids), 0), dtype=np.int64), np.zeros((len(ids), 0), dtype=np.float32)
    if numbers.ndim != 2 or numbers.dtype.kind not in "iuf":
        raise RecordError(f"{names[1]}: must be numbers")
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise RecordError(f"{names[0]}: must be token ids")
    return tokens.astype(np.int64), require_numbers(numbers.astype(np.float32), names[1])


def require_numbers(values: FloatArray, name: str) -> FloatArray:
    """Return values, absent ones as -inf. Raises RecordError if one is NaN or infinite."""
    if not (values < np.inf).all():
        row = int((~(values < np.inf)).any(1).argmax())
        raise RecordError(f"{name}: must be numbers, got {values[row][~(values[row] < np.inf)][0]} at position {row}")
    return np.where(values <= LOWEST, np.float32(-np.inf), values)


def places(rows: int, length: int, mask: NDArray[np.bool_] | None, name: str) -> IntArray:
    """Return the token at which each row stands: every token, every one but the last, or those of a target mask.

    Raises RecordError if the number of rows fits none of these.
    """
    if mask is not None and rows == int(mask.sum()) and rows < length - 1:
        return np.flatnonzero(mask)
    if rows in (length, length - 1):
        return np.arange(rows)
    targets = "" if mask is None else f", or {int(mask.sum())} as target_mask says"
    raise RecordError(f"{name}: must have {length} rows, as there are tokens, or one less{targets}; got {rows}")


def targets_of(record: Mapping[str, Any], length: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Return which tokens are targets by ``labels`` (-100: not) or ``target_mask``, and which precede one, (L,) each.

    Raises RecordError if one has another length than the text.
    """
    wanted: NDArray[np.bool_] = np.ones(length, dtype=bool)
    mask: NDArray[np.bool_] | None = None
    if record.get("labels") is not None:
        wanted = token_ids(record, "labels") != -100
        mask = np.append(wanted[1:], False)
    elif record.get("target_mask") is not None:
        marks = _array(record["target_mask"], "target_mask").astype(bool)
        mask = marks if marks.ndim == 1 else np.asarray(marks.any(-1))  # axolotl's has one per entry
        wanted = np.concatenate([[False], mask[:-1]])
    if len(wanted) != length:
        raise RecordError(f"labels or target_mask: must be one per token, {length}, got {len(wanted)}")
    return wanted, mask


def _length(row: Any, name: str) -> int:
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise RecordError(f"{name}: must be a list of lists, one per position, got {shown(row, 40)} in it")
    return len(row)


def _filled(rows: Sequence[Any], width: int, value: float) -> list[list[Any]]:
    return [list(row or ()) + [value] * (width - len(row or ())) for row in rows]


def _array(values: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, OverflowError, TypeError) as error:
        raise RecordError(f"{name}: must be a list of numbers of one length") from error
