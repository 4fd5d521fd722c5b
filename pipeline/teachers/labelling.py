"""Turn hidden states into labels, in slices: the step that all engines share, on whatever device the rows are.

Legend: N target positions, V vocabulary, M tail draws.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.invariants import impossible
from logitcask.cache.labels import Example, IntArray, Shard, SparseTargets
from logitcask.cache.manifest import ExactCode, LabelSettings
from logitcask.pipeline.models.head import non_finite_remedy
from logitcask.pipeline.teachers.exact.coder import HiddenCoder
from logitcask.pipeline.teachers.exact.fit import BIASED, calibration_positions, fitted, tail_bias
from logitcask.pipeline.teachers.fidelity_probe import Probe
from logitcask.pipeline.teachers.sparsify import sparsify, uniform_draws
from logitcask.pipeline.teachers.teacher import ExactTeacher, Teacher, TokenizedExample

Advance = Callable[[int], None]  # called with the number of tokens of what was just labelled

SLICE_LOGITS = 1 << 24  # logits in memory at a time on an accelerator: 64 MiB in float32, whatever the batch
HOST_LOGITS = 1 << 25  # on a CPU, which copies few of them: the more rows, the faster a product with the head
FRESH_LOGITS = 31 << 18  # if each slice is newly allocated: below 32 MiB the C library reuses freed memory
CACHED_LOGITS = 1 << 20  # of these, sparsified at a time on a CPU: what its cache holds


def slice_rows(vocab_size: int, device: torch.device, *, fresh: bool) -> int:
    """Return the rows of logits to compute at a time; ``fresh``: whether each slice is newly allocated."""
    on_host = FRESH_LOGITS if fresh else HOST_LOGITS
    return max(1, (on_host if device.type == "cpu" else SLICE_LOGITS) // vocab_size)


def label_rows(
    logits_of: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    gold_N: IntArray,
    uniforms_NM: NDArray[np.float64],
    measured_N: NDArray[np.bool_],
    label: LabelSettings,
    probe: Probe | None,
    rows: int,
    coder: HiddenCoder | None = None,
) -> tuple[SparseTargets, FidelitySums]:
    """Return labels of N positions from their hidden states, and the fidelity sums of those that are ``measured``.

    They are exact if there is a ``coder`` of hidden states. Logits are computed for ``rows`` positions at a time; those
    beyond the tokenizer's vocabulary (padding of the embedding matrix) are dropped before normalizing.
    """
    device = hidden_NH.device
    block = rows if device.type != "cpu" else max(1, CACHED_LOGITS // label.vocab_size)
    parts: list[SparseTargets] = []
    sums = FidelitySums.zeros(label.temperatures, exact=label.exact is not None)
    rebuilt = None if coder is None else coder.rebuilt
    all_gold, all_uniforms = torch.from_numpy(gold_N).to(device), torch.from_numpy(uniforms_NM).to(device)
    for first in range(0, len(hidden_NH), rows):
        cut = slice(first, first + rows)
        logits_NV = logits_of(hidden_NH[cut])[:, : label.vocab_size]
        gold, uniforms = all_gold[cut], all_uniforms[cut]
        cuts = [slice(start, start + block) for start in range(0, len(logits_NV), block)]
        targets = SparseTargets.concatenate(
            [sparsify(logits_NV[c], gold[c], uniforms[c], label.head_size, label.temperatures) for c in cuts]
        )
        if coder is not None:
            targets = coder.encode(hidden_NH[cut], targets)
        parts.append(targets)
        chosen = np.flatnonzero(measured_N[cut])
        if probe is not None and len(chosen):
            at = torch.from_numpy(chosen).to(device)
            with np.errstate(invalid="ignore"):  # impossible labels are refused when their example is known
                sums += probe.measure(logits_NV[at], hidden_NH[cut][at], targets[chosen], label, rebuilt)
        del logits_NV  # else it and the next slice would be in memory together
    return SparseTargets.concatenate(parts), sums


def fitted_head(
    teacher: ExactTeacher, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings, bits: int
) -> tuple[TeacherHead, ExactCode]:
    """Return the teacher's head with the basis in which its hidden states are coded, fitted to those of some batches.

    As many batches are used as hold the positions that ``fit`` wants, and of a larger one, as vLLM's are, every n-th
    example. Those after the ones that the basis is fitted to show what labels are off by; if they are few, all do.
    """
    head = teacher.output_head(label.vocab_size)
    fitted_to, held, states = calibration_positions(head.weight.shape[1]), 0, []
    wanted = fitted_to + BIASED
    for batch in batches:
        if held < wanted:
            count = sum(int(example.target_mask.sum()) for example in batch)
            states.append(teacher.hidden_states(batch[:: max(1, count // (wanted - held))]))
            held += len(states[-1])
    hidden_NW = np.concatenate(states)
    finite_NW = hidden_NW[np.isfinite(hidden_NW).all(1)]  # an example that has others is refused with its labels
    if not len(finite_NW):
        dtype = teacher.facts.identity.dtype
        raise LogitcaskError(f"the teacher's hidden states are not finite in {dtype}: {non_finite_remedy(dtype)}")
    known_NW, others_NW = finite_NW[:fitted_to], finite_NW[fitted_to:]
    head, code = fitted(head, known_NW, label, bits)
    biases = tail_bias(head, others_NW if len(others_NW) >= BIASED // 8 else known_NW, code, label)
    return head, code.model_copy(update={"tail_bias": biases})


def batch_draws(batch: Sequence[TokenizedExample], counts: Sequence[int], label: LabelSettings) -> NDArray[np.float64]:
    """Return the uniform numbers of a batch's target positions, (N, M)."""
    return np.concatenate(
        [
            uniform_draws(label.seed, example.index, count, label.tail_draws)
            for example, count in zip(batch, counts, strict=True)
        ]
    )


def split_rows(targets: SparseTargets, counts: Sequence[int]) -> list[SparseTargets]:
    """Split concatenated labels into those of each example; ``counts`` are their positions."""
    ends = np.cumsum(counts)
    return [targets[int(end - count) : int(end)] for end, count in zip(ends, counts, strict=True)]


def label_shard(
    teacher: Teacher, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings, advance: Advance
) -> Shard:
    """Return a labelled shard, its examples sorted by index; the batches may hold them in any order.

    Raises LogitcaskError at the first impossible label.
    """
    labelled: dict[int, Example] = {}
    fidelity = FidelitySums.zeros(label.temperatures, exact=label.exact is not None)
    projection: NDArray[np.float64] | None = None
    for batch in batches:
        labels = teacher.label(batch, label)
        if labels.projection is not None:
            projection = labels.projection + (0 if projection is None else projection)
        require_possible(batch, labels.targets, label, teacher.facts.identity.dtype)
        fidelity += labels.fidelity
        for example, targets in zip(batch, labels.targets, strict=True):
            labelled[example.index] = Example(example.input_ids, example.target_mask, targets, example.metadata)
            advance(len(example.input_ids))
    return Shard.of([labelled[index] for index in sorted(labelled)], fidelity, projection)


def require_possible(
    batch: Sequence[TokenizedExample], labels: Sequence[SparseTargets], label: LabelSettings, dtype: str
) -> None:
    """Raise LogitcaskError if a label of a batch is impossible: the teacher's numbers overflowed, or its engine erred.

    It names the example, by its index in the cache, and the position.
    """
    flaw = impossible(SparseTargets.concatenate(labels), label)
    if flaw is None:
        return
    row, problem = flaw
    ends = np.cumsum([len(targets) for targets in labels])
    which = int(np.searchsorted(ends, row, side="right"))
    position = np.flatnonzero(batch[which].target_mask)[row - (ends[which] - len(labels[which]))]
    raise LogitcaskError(
        f"the label of example {batch[which].index}, position {position}, is impossible: {problem}: the teacher ran "
        f"in {dtype}: {non_finite_remedy(dtype)}"
    )
