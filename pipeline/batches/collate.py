"""What a batch holds: examples collated into tensors, soft labels at one temperature.

Legend: R rows of a batch, L tokens per row, N target positions of the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from logitcask.cache.labels import (
    Array,
    ExactTargets,
    FloatArray,
    IntArray,
    SoftLabels,
    SparseTargets,
    soft_labels,
    temperature_index,
)
from logitcask.pipeline.models.dense.rows import EXACT, CodedHead, ExactLabels
from logitcask.pipeline.text.tokens.encoded import Encoded

CPU_PART = 1024  # places for tokens in a forward pass on a CPU: enough for products at full speed
Batch = dict[str, Any]  # tensors by name, and SoftLabels or ExactLabels of tensors
TeacherHead = Callable[[torch.device], CodedHead]


@dataclass(frozen=True)
class TrainingExample:
    """Tokens (L,), target mask (L,) and, if the loss has a soft part, the labels of the mask's positions."""

    encoded: Encoded
    targets: SparseTargets | None
    source: int = 0  # which of several caches it is from
    temperature: float | None = None  # of its labels, if not the collator's


@dataclass(frozen=True)
class BothSides:
    """The examples of a batch with what a teacher in memory reads of them in its own vocabulary; on no device."""

    examples: tuple[Encoded, ...]

    def to(self, *_: Any, **__: Any) -> Self:
        """Return it as it is."""
        return self


class Examples(Dataset[TrainingExample]):
    """Examples by index, of which the number is known."""

    def __len__(self) -> int:
        raise NotImplementedError

    def describe(self, indices: Sequence[int]) -> str:
        """Return what messages call these examples: their numbers where they are stored."""
        return ", ".join(map(str, indices))


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
    teacher_head: TeacherHead | None = None  # of exact labels, whose tail is EXACT

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        """Return a batch: input_ids (R, L), padded on the right; target_index (N,) into the flattened rows; gold (N,);
        is_token (R, L), which places are not padding; slots (2,), the number of tokens and of the places R * L;
        soft_labels of N rows, if the examples have labels; both_sides, if they have companions; position_ids (R, L),
        restarting at 0 with each example, if examples share rows.

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
        if examples and examples[0].encoded.companion:
            batch["both_sides"] = BothSides(tuple(example.encoded for example in examples))
        labels = self.soft_labels(examples)
        if labels is not None:
            batch["soft_labels"] = labels.map(torch.from_numpy)
        return batch

    def soft_labels(self, examples: Sequence[TrainingExample]) -> SoftLabels[Array] | ExactLabels[Array] | None:
        """Return the labels of the examples at the training temperature, N rows; None if they have none."""
        parts = [example.targets for example in examples if example.targets is not None]
        if not parts:
            return None
        if self.tail == EXACT:
            return self.exact_labels(examples, [self.temperatures], parts[0].head_ids.shape[1])
        return soft_labels(
            SparseTargets.concatenate(parts), self.temperatures, self.temperature_of(examples), self.tail
        )

    def exact_labels(
        self, examples: Sequence[TrainingExample], stored: Sequence[tuple[float, ...]], head_size: int
    ) -> ExactLabels[Array]:
        """Return the exact labels of the examples that have labels."""
        parts = [(example.targets, example.source) for example in examples if isinstance(example.targets, ExactTargets)]
        assert self.teacher_head is not None
        temperature = self.temperature_of(examples)
        return exact_labels(parts, stored, self.temperatures, temperature, head_size, self.teacher_head)

    def temperature_of(self, examples: Sequence[TrainingExample]) -> float:
        """Return the temperature of a batch's labels."""
        given = examples[0].temperature
        return self.temperature if given is None else given


@dataclass(frozen=True)
class MixedCollator(Collator):
    """Collates examples of several caches, whose labels may differ in their sizes and temperatures.

    All rows have the smallest head of the caches: a larger one is cut to it. What is cut off counts as drawn exactly
    for ``sampled`` and ``renormalize``, which changes neither, and into the rest for ``bucket``.
    """

    by_source: tuple[tuple[float, ...], ...] = ()  # the temperatures of each cache
    head_size: int = 0  # the smallest of the caches
    replays: bool = False  # whether some sources have no labels

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        """Return a batch, with ``labelled`` (N,) if some sources have no labels: which positions have a row of them."""
        batch = super().__call__(examples)
        if self.replays:
            known = [np.full(example.encoded.target_mask.sum(), example.targets is not None) for example in examples]
            batch["labelled"] = torch.from_numpy(np.concatenate([np.zeros(0, dtype=bool), *known]))
        return batch

    def soft_labels(self, examples: Sequence[TrainingExample]) -> SoftLabels[Array] | ExactLabels[Array] | None:
        """Return the labels of the examples at the training temperature, N rows; None if they have none."""
        if self.tail == EXACT:
            labelled = any(example.targets is not None for example in examples)
            return self.exact_labels(examples, self.by_source, self.head_size) if labelled else None
        counts = [0 if example.targets is None else len(example.targets) for example in examples]
        places = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
        rows, labels = [], []
        for source, temperatures in enumerate(self.by_source):
            chosen = [i for i, example in enumerate(examples) if example.source == source and example.targets]
            if chosen:
                rows.append(np.concatenate([places[i] for i in chosen]))
                parts = [targets for i in chosen if (targets := examples[i].targets) is not None]
                joined = SparseTargets.concatenate(parts)
                own = soft_labels(joined, temperatures, self.temperature_of(examples), self.tail)
                labels.append(cut_head(own, self.head_size))
        return merge_rows(labels, rows) if labels else None


def places_at_once(rows: int, length: int, places: int = CPU_PART) -> int:
    """Return how many places for tokens the largest part has, of a batch of so many rows of a length."""
    return min(rows, max(1, places // length)) * length


def in_parts(batch: Batch, places: int) -> list[Batch]:
    """Return a batch as batches of whole rows, each with at most so many places for tokens, or of a single row.

    Padding that no row of a part needs is cut off. One with ``both_sides``, whose examples are not rows, stays whole.
    """
    rows, length = batch["input_ids"].shape
    at_once = places_at_once(rows, length, places) // length
    if at_once == rows or "both_sides" in batch:
        return [batch]
    row_of = batch["target_index"] // length
    return [_rows_of(batch, row_of, first, min(first + at_once, rows)) for first in range(0, rows, at_once)]


def _rows_of(batch: Batch, row_of: torch.Tensor, first: int, end: int) -> Batch:
    """Return the rows from ``first`` to ``end`` of a batch whose targets (N,) are in the rows ``row_of``."""
    before = batch["input_ids"].shape[1]
    length = int(batch["is_token"][first:end].any(0).nonzero().max()) + 1
    names = [name for name in ("input_ids", "is_token", "position_ids") if name in batch]
    part: Batch = {name: batch[name][first:end, :length] for name in names}
    chosen = ((row_of >= first) & (row_of < end)).nonzero().flatten()
    part["target_index"] = (row_of[chosen] - first) * length + batch["target_index"][chosen] % before
    part["gold"] = batch["gold"][chosen]
    part["slots"] = torch.stack([part["is_token"].sum(), batch["slots"].new_tensor(part["is_token"].numel())])
    labels = chosen
    if "labelled" in batch:
        part["labelled"] = batch["labelled"][chosen]
        labels = (batch["labelled"].cumsum(0) - 1)[chosen[part["labelled"]]]
    if "soft_labels" in batch and (len(labels) or "labelled" not in batch):
        part["soft_labels"] = batch["soft_labels"].map(lambda values: values[labels])
    return part


def cut_head(labels: SoftLabels[Array], head_size: int) -> SoftLabels[Array]:
    """Return labels with a head of the first ``head_size`` tokens; those after it count as entries outside the head."""
    if labels.head_size == head_size:
        return labels
    mass = labels.weights[:, head_size : labels.head_size].astype(np.float64).sum(1)
    if labels.tail == "renormalize":
        mass *= -np.expm1(labels.log_rest.astype(np.float64))
    with np.errstate(divide="ignore"):
        log_rest = np.logaddexp(labels.log_rest, np.log(mass)).astype(np.float32)
    columns = slice(0, head_size if labels.tail == "bucket" else labels.ids.shape[1])
    ids, weights, log_probs = (part[:, columns] for part in (labels.ids, labels.weights, labels.log_probs))
    return replace(
        labels, ids=ids, weights=weights, log_probs=log_probs, log_rest=np.minimum(log_rest, 0), head_size=head_size
    )


def merge_rows(parts: Sequence[SoftLabels[Array]], rows: Sequence[IntArray]) -> SoftLabels[Array]:
    """Return labels whose ``rows[i]`` are those of ``parts[i]``; narrower ones are padded with entries of weight 0."""
    count, width = sum(map(len, rows)), max(part.ids.shape[1] for part in parts)
    merged = replace(
        parts[0],
        ids=np.zeros((count, width), np.int64),
        weights=np.zeros((count, width), np.float32),
        log_probs=np.zeros((count, width), np.float32),
        log_rest=np.zeros(count, np.float32),
    )
    for part, places in zip(parts, rows, strict=True):
        for name in ("ids", "weights", "log_probs"):
            getattr(merged, name)[places, : part.ids.shape[1]] = getattr(part, name)
        merged.log_rest[places] = part.log_rest
    return merged


def exact_labels(
    parts: Sequence[tuple[ExactTargets, int]],
    stored: Sequence[tuple[float, ...]],
    common: tuple[float, ...],
    temperature: float,
    head_size: int,
    teacher_head: TeacherHead,
) -> ExactLabels[Array]:
    """Return the labels of some examples, each with the number of its cache, at a temperature T.

    ``stored`` are the temperatures of each cache and ``common`` those of all, of which the one nearest to T gives the
    tail's mass; the tokens of a head after the first ``head_size`` count into the tail.
    """
    anchor = min(common, key=lambda t: abs(math.log(t / temperature)))
    columns = max(targets.codes.shape[1] for targets, _ in parts)
    tails = [_log_tail(targets, stored[source], anchor, head_size) for targets, source in parts]
    biases = [targets.tail_bias[:, temperature_index(stored[source], anchor)] for targets, source in parts]
    return ExactLabels(
        ids=np.concatenate([targets.head_ids[:, :head_size] for targets, _ in parts]).astype(np.int64),
        log_probs=np.concatenate([targets.head_logprobs[:, :head_size] for targets, _ in parts]).astype(np.float32),
        log_tail=np.concatenate(tails),
        tail_bias=np.concatenate(biases),
        codes=np.concatenate(
            [np.pad(targets.codes, ((0, 0), (0, columns - targets.codes.shape[1]))) for targets, _ in parts]
        ),
        steps=np.concatenate([targets.steps for targets, _ in parts]),
        source=np.repeat(np.array([source for _, source in parts]), [len(targets) for targets, _ in parts]),
        temperature=temperature,
        anchor=anchor,
        teacher_head=teacher_head,
    )


def _log_tail(targets: ExactTargets, temperatures: tuple[float, ...], anchor: float, head_size: int) -> FloatArray:
    """Return log of the sum of p(v)^(1 / anchor) over the tokens after the first ``head_size``, (N,)."""
    j = temperature_index(temperatures, anchor)
    log_tail = (targets.log_partition[:, j] + targets.log_tail_mass[:, j]).astype(np.float32)
    for column in targets.head_logprobs.T[head_size:]:
        log_tail = np.logaddexp(log_tail, column.astype(np.float32) / np.float32(anchor))
    return log_tail


def labels_are_finite(batch: Batch) -> bool:
    """Return whether every number in a batch's labels is finite; True for a batch without labels."""
    parts = vars(batch["soft_labels"]).values() if "soft_labels" in batch else []
    return all(bool(part.isfinite().all()) for part in parts if isinstance(part, torch.Tensor))
