"""Invariants of a shard's numbers. Digests do not replace them: a stranger's may match and the labels still be wrong.

``impossible`` finds labels that no teacher can have given before they are coded, ``unusable`` what would crash a
student or spoil its loss, on every write and read. ``inconsistent`` looks deeper into coded labels, for
``cache.verify``.

Legend: N target positions, K head tokens, M tail draws, V vocabulary. l is a log-probability in nats, at T=1.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import FloatArray, IntArray, Shard, SparseTargets
from logitcask.cache.layout import GOLD_SCALE, HEAD_SCALE, ODDS_SCALE, TAIL_STEPS, TAIL_UNIT
from logitcask.cache.manifest import LabelSettings, Manifest, label_entries, metadata_values

COMPARED_AT_ONCE = 1 << 20  # label entries
ROUNDING = 1e-3  # nats: the rounding of float32
HALF_STEP = np.float32(np.exp(0.5 / TAIL_STEPS))  # half a code of a drawn token, as a factor on d + TAIL_UNIT
LOST_MASS = 0.02  # by which head and tail may differ from 1: the rounding of float32 at logits of 65,504
Flags = NDArray[np.bool_]


def impossible(targets: SparseTargets, label: LabelSettings) -> tuple[int, str] | None:
    """Return a row that no teacher can have given, and why; None if there is none.

    For labels before they are coded: codes have no NaN and no sign, so NaN would become 0, which is certainty.
    """
    with np.errstate(all="ignore"):
        return next(_impossible_rows(targets, label), None)


def require_possible(index: int, shard: Shard, manifest: Manifest) -> None:
    """Raise LogitcaskError if a shard holds what readers would refuse or no teacher can have given."""
    flaw = impossible(shard.targets, manifest.label)
    if flaw is not None:
        token = int(np.flatnonzero(shard.target_mask)[flaw[0]])
        ends = np.cumsum(shard.token_count)
        example = int(np.searchsorted(ends, token, side="right"))
        raise LogitcaskError(
            f"shard {index} is not written: the label of its example {example}, position "
            f"{token - int(ends[example] - shard.token_count[example])}, is impossible: {flaw[1]}; "
            f"the teacher ran in {manifest.teacher.dtype}: use bfloat16 or float32"
        )
    problem = next(unusable(shard, manifest), None)
    if problem is None and shard.fidelity is not None and not np.isfinite(shard.fidelity.row).all():
        problem = "fidelity: must be finite"
    if problem is not None:
        raise LogitcaskError(f"shard {index} is not written: readers would refuse it: {problem}: label it again")


def _impossible_rows(targets: SparseTargets, label: LabelSettings) -> Iterator[tuple[int, str]]:
    """Yield the first row with each fault. Whole arrays first: rows are looked at only if there is a fault."""
    for name in ("gold_logprobs", "head_logprobs", "log_tail_mass", "tail_logprobs"):
        values = getattr(targets, name)
        if not values.max(initial=-np.inf) <= ROUNDING:  # nor if it is NaN
            yield _first(values, ~(values <= ROUNDING), f"{name} must be at most 0")
    if np.isneginf(targets.tail_logprobs.min(initial=0)):
        yield _first(targets.tail_logprobs, np.isneginf(targets.tail_logprobs), "tail_logprobs must be finite")
    partition, tail, one = targets.log_partition, targets.log_tail_mass, np.ones(label.head_size, np.float32)
    if not np.isfinite(partition).all():
        yield _first(partition, ~np.isfinite(partition), "log_partition must be finite")
    for j, temperature in enumerate(label.temperatures):
        head = targets.head_logprobs / np.float32(temperature) - partition[:, j, None]
        mass = np.exp(head) @ one + np.exp(tail[:, j])
        if not np.abs(mass - 1).max(initial=0) <= LOST_MASS:
            name = f"the masses of head and tail at T={temperature:g} must sum to 1"
            yield _first(mass, ~(np.abs(mass - 1) <= LOST_MASS), name)
        normal = np.abs(partition[:, j]) if temperature == 1.0 else np.zeros(0)
        if normal.max(initial=0) > HEAD_SCALE + ODDS_SCALE:
            yield _first(partition[:, j], normal > HEAD_SCALE + ODDS_SCALE, "log_partition at T=1 must be 0")
    if label.tail_draws:
        massless = np.isneginf(tail).any(1)
        if not np.array_equal(massless, targets.tail_counts[:, 0] == 0):
            wrong = massless != (targets.tail_counts[:, 0] == 0)
            yield _first(targets.tail_counts[:, 0], wrong, "a tail must have draws if it has mass, and none if not")


def _first(values: NDArray[Any], wrong: Flags, rule: str) -> tuple[int, str]:
    """Return the first row with a wrong value, and the rule with that value."""
    row = int(wrong.reshape(len(wrong), -1).any(1).argmax())
    return row, f"{rule}, got {values[row][wrong[row]].flat[0]:.6g}"


def unusable(shard: Shard, manifest: Manifest) -> Iterator[str]:
    """Yield what would crash a student or spoil its loss: ids without an embedding, a wrong mask, non-finite numbers.

    Cheap enough for every read; ``inconsistent`` looks deeper.
    """
    targets, vocab = shard.targets, manifest.label.vocab_size
    for name, ids in (("input_ids", shard.input_ids), ("head_ids", targets.head_ids), ("tail_ids", targets.tail_ids)):
        if ids.size and int(ids.max()) >= vocab:
            yield f"{name}: id {int(ids.max())} is outside the vocabulary of {vocab}"
    longest = manifest.data.longest
    if int(shard.token_count.min()) < 1 or int(shard.token_count.max()) > longest:
        yield f"token_count: an example must have 1 to {longest} tokens"
        return
    for name, values in metadata_values(manifest).items():
        codes = shard.metadata[name]
        if len(codes) != len(shard) or int(codes.min()) < 0 or int(codes.max()) > len(values):
            yield f"{name}: must be from 0 to {len(values)} for each example"
    ends = np.cumsum(shard.token_count)
    spans = zip((ends - shard.token_count).tolist(), ends.tolist(), strict=True)
    labelled = [np.count_nonzero(shard.target_mask[start:end]) for start, end in spans]
    if not np.array_equal(labelled, shard.position_count):
        yield "target_mask and position_count disagree"
    if shard.target_mask[ends - 1].any():
        yield "target_mask: the last token of an example has no next token"
    if not np.isfinite(targets.log_partition).all():
        yield "log_partition: must be finite"
    if not np.isfinite(targets.tail_logprobs).all():
        yield "tail_logprobs: must be finite"
    for name in ("head_logprobs", "log_tail_mass", "gold_logprobs"):
        if np.isnan(getattr(targets, name)).any():
            yield f"{name}: must be numbers"


def inconsistent(shard: Shard, label: LabelSettings) -> list[str]:
    """Return what no teacher can have given: repeated ids, masses or next tokens that contradict the label.

    Positions are compared some at a time; of problems of one kind the first is returned.
    """
    problems: dict[str, str] = {}
    next_ids = shard.input_ids[1:][shard.target_mask[:-1]]
    step = max(1, COMPARED_AT_ONCE // label_entries(label))
    with np.errstate(divide="ignore", invalid="ignore"):  # minus infinities compare as they should
        for first in range(0, len(shard.targets), step):
            rows = slice(first, first + step)
            for problem in _problems(shard.targets[rows], next_ids[rows], label):
                problems.setdefault(re.sub(r"[0-9.e+-]+", "", problem), problem)
    return list(problems.values())


def _problems(targets: SparseTargets, next_ids: IntArray, label: LabelSettings) -> Iterator[str]:
    counts = targets.tail_counts
    if not np.isin(counts.sum(1), (0, label.tail_draws)).all():
        yield f"tail_counts: a row must sum to 0 or {label.tail_draws}"
    if (counts[:, 1:][counts[:, :-1] == 0] > 0).any():
        yield "tail_counts: padding must come last"
    if (targets.head_logprobs[:, 1:] > targets.head_logprobs[:, :-1]).any():
        yield "head_logprobs: the most probable token must come first"
    yield from _repeated_ids(targets)
    drawn = _drawn_range(targets)
    yield from _masses(targets, drawn[0], label)
    yield from _next_tokens(targets, drawn, next_ids)


def _repeated_ids(targets: SparseTargets) -> Iterator[str]:
    padding = -1 - np.arange(targets.tail_ids.shape[1], dtype=np.int32)  # distinct, and no token's
    tail = np.where(targets.tail_counts > 0, targets.tail_ids, padding).astype(np.int32)
    head = targets.head_ids.astype(np.int32)
    if not _rows_with_repeats(np.concatenate([head, tail], axis=1)):
        return
    in_head, in_tail = _rows_with_repeats(head), _rows_with_repeats(tail)
    if in_head:
        yield f"head_ids: an id is repeated in {in_head} rows or more"
    if in_tail:
        yield f"tail_ids: an id is repeated in {in_tail} rows or more"
    if not (in_head or in_tail):
        yield "tail_ids: a drawn id is in the head too"


def _rows_with_repeats(ids: NDArray[np.int32]) -> int:
    """Return the number of rows that contain an id more than once."""
    ordered = np.sort(ids, axis=1)
    return int((ordered[:, 1:] == ordered[:, :-1]).any(1).sum())


def _masses(targets: SparseTargets, lowest: FloatArray, label: LabelSettings) -> Iterator[str]:
    """Yield contradictions between masses.

    Head and tail must sum to 1. The tail's mass is at least that of its drawn tokens, and at most that of V - K tokens
    as probable as the last of the head.
    """
    outside = label.vocab_size - label.head_size
    most_tokens = np.log(np.float32(outside))
    head = _log_sum(targets.head_logprobs) if label.head_size else np.zeros(len(targets), np.float32)
    if (head > HEAD_SCALE).any():
        yield f"head_logprobs: the head's mass must be at most 1, got {np.exp(head.max()):.3g}"
    for j, temperature in enumerate(label.temperatures):
        partition, tail = targets.log_partition[:, j], targets.log_tail_mass[:, j]
        slack = ODDS_SCALE + 2 * HEAD_SCALE / temperature + ROUNDING
        if temperature == 1.0 and (np.abs(partition) > HEAD_SCALE + ODDS_SCALE).any():
            worst = float(np.exp(partition[np.abs(partition).argmax()]))
            yield f"head and tail mass must sum to 1, got {worst:.3g}"
        most = most_tokens + targets.head_logprobs[:, -1] / temperature - partition if label.head_size else 0.0
        if (tail > most + slack).any():
            yield f"log_tail_odds: at T={temperature:g} more mass than {outside} tokens below the head can have"
        if label.tail_draws:
            drawn = _log_sum(lowest / np.float32(temperature)) - partition
            if (drawn > tail + slack).any():
                yield f"log_tail_odds: at T={temperature:g} less mass than the drawn tokens alone have"


def _log_sum(logs: FloatArray) -> FloatArray:
    """Return log sum exp of each row; -inf if every entry is."""
    most = np.maximum(logs.max(1, keepdims=True), np.finfo(np.float32).min)
    sums: FloatArray = most[:, 0] + np.log(np.exp(logs - most).sum(1))
    return sums


def _drawn_range(targets: SparseTargets) -> tuple[FloatArray, FloatArray]:
    """Return the least and the greatest l that the code of each drawn token stands for, (N, M); -inf for padding."""
    last = targets.head_logprobs[:, -1:] if targets.head_logprobs.shape[1] else np.zeros((len(targets), 1), np.float32)
    last = np.where(np.isneginf(last), np.float32(0.0), last)
    below = last - targets.tail_logprobs + np.float32(TAIL_UNIT)
    unused = targets.tail_counts == 0
    low, high = (last + np.float32(TAIL_UNIT) - below * factor for factor in (HALF_STEP, 1 / HALF_STEP))
    return np.where(unused, -np.inf, low), np.where(unused, -np.inf, high)


def _next_tokens(targets: SparseTargets, drawn: tuple[FloatArray, FloatArray], next_ids: IntArray) -> Iterator[str]:
    """Yield contradictions of gold_logprobs: l of a next token in the head or drawn is known, else below the head's."""
    gold, ids = targets.gold_logprobs, next_ids[:, None]
    slack = (HEAD_SCALE + GOLD_SCALE) / 2 + ROUNDING
    in_head = targets.head_ids == ids
    any_head = in_head.any(1)
    head = np.where(in_head, targets.head_logprobs, -np.inf).max(1, initial=-np.inf)
    if (_differ(gold, head, slack) & any_head).any():
        yield "gold_logprobs: differs from the head's where the next token of input_ids is in the head"
    if targets.head_ids.shape[1] and (~any_head & (gold > targets.head_logprobs[:, -1] + slack)).any():
        yield "gold_logprobs: above the head's last where the next token of input_ids is not in the head"
    in_tail = (targets.tail_ids == ids) & (targets.tail_counts > 0)
    low, high = (np.where(in_tail, each, -np.inf).max(1, initial=-np.inf) for each in drawn)
    if (in_tail.any(1) & ((gold < low - slack) | (gold > high + slack))).any():
        yield "gold_logprobs: differs from the drawn token's where the next token of input_ids was drawn"


def _differ(these: FloatArray, those: FloatArray, slack: float) -> Flags:
    """Return where two log-probabilities differ; -inf equals itself."""
    flags: Flags = (these != those) & ~(np.abs(these - those) <= slack)
    return flags
