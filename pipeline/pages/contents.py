"""What the page shows of an example: its tokens and labels, packed into bytes that labels.js reads.

Legend: L tokens, N target positions, K head tokens, D draws shown, J stored temperatures. Log-probabilities and
entropies are in nats, in steps of 1 / ``STEPS``; integers are little-endian.
"""

import base64
import gzip
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from logitcask.cache.labels import Example, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.report.label_figures import entropies
from logitcask.pipeline.batches.collate import TeacherHead
from logitcask.pipeline.evaluate.on_cache import labels_at, position_metrics
from logitcask.pipeline.models.head import SLICE_LOGITS, LMHead, last_hidden_states

STEPS = 256  # per nat
DRAWS_SHOWN = 8  # the most probable ones
Array = NDArray[Any]


@dataclass(frozen=True)
class StudentRows:
    """A student's figures of N target positions, at T=1 but for the divergence."""

    head: Array  # (N, K) log-probabilities of the head's tokens
    draws: Array  # (N, D) log-probabilities of the draws shown
    gold: Array  # (N,) log-probability of the next token
    kl: Array  # (N,) KL(teacher || student) at the label's first temperature: an estimate unless labels are exact


def shown_draws(targets: SparseTargets) -> tuple[Array, Array, Array]:
    """Return ids, log-probabilities and counts (N, D) of the most probable draws; a count of 0 is padding."""
    width = min(DRAWS_SHOWN, targets.tail_ids.shape[1])
    keys = np.where(targets.tail_counts > 0, -targets.tail_logprobs.astype(np.float32), np.inf)
    order = np.argsort(keys, axis=1, kind="stable")[:, :width]
    ids, logprobs, counts = (
        np.take_along_axis(part, order, axis=1)
        for part in (targets.tail_ids, targets.tail_logprobs, targets.tail_counts)
    )
    return ids, logprobs, counts


def student_rows(
    model: PreTrainedModel, head: LMHead, example: Example, label: LabelSettings, teacher: TeacherHead | None = None
) -> StudentRows:
    """Return what a model, whose head was read before, says at the example's target positions.

    ``teacher`` reads exact labels.
    """
    targets = example.targets
    places = np.flatnonzero(example.target_mask)
    gold = torch.from_numpy(example.input_ids[places + 1])
    temperature = label.temperatures[0]
    tail = "sampled" if label.tail_draws or label.head_size >= label.vocab_size else "bucket"
    draws, _, _ = shown_draws(targets)
    ids = torch.from_numpy(np.concatenate([targets.head_ids, draws], axis=1).astype(np.int64))
    rows: list[Array] = []
    with torch.inference_mode():
        hidden = last_hidden_states(model, torch.from_numpy(example.input_ids)[None].to(model.device))[0]
        at_once = max(1, SLICE_LOGITS // len(head.weight))
        for part in (slice(i, i + at_once) for i in range(0, len(targets), at_once)):
            logits = head.logits(hidden[torch.from_numpy(places[part]).to(model.device)]).float().cpu()
            labels = labels_at(temperature, targets[part], label, tail, teacher, logits.device)
            metrics = position_metrics(logits, gold[part], [(temperature, labels)], tail)
            of_ids = torch.log_softmax(logits, dim=1).gather(1, ids[part])
            rows.append(torch.cat([of_ids, -metrics.hard_n[:, None], metrics.kl_nJ], dim=1).numpy())
    whole, k = np.concatenate(rows), targets.head_ids.shape[1]
    return StudentRows(whole[:, :k], whole[:, k:-2], whole[:, -2], whole[:, -1])


def pack(example: Example, label: LabelSettings, student: StudentRows | None) -> tuple[dict[str, Any], set[int]]:
    """Return the page's entry of an example, and the ids of all tokens in it."""
    targets = example.targets
    draws, draw_logprobs, counts = shown_draws(targets)
    entropy = entropies(targets, label, label.temperatures[0])
    wide = [example.input_ids, targets.head_ids, draws]
    narrow = [targets.head_logprobs, draw_logprobs, targets.gold_logprobs]
    narrow += [targets.log_partition, targets.log_tail_mass, entropy]
    if student is not None:
        narrow += [student.head, student.draws, student.gold, student.kl]
    data = b"".join(
        [np.ascontiguousarray(part, dtype="<i4").tobytes() for part in wide]
        + [_steps(part).tobytes() for part in narrow]
        + [counts.astype("<u2").tobytes(), example.target_mask.astype(np.uint8).tobytes()]
    )
    entry = {
        "tokens": len(example.input_ids),
        "positions": len(targets),
        "surprise": _mean(-targets.gold_logprobs.astype(np.float64)),
        "entropy": _mean(entropy),
        "kl": None if student is None else _mean(student.kl),
        "data": base64.b64encode(gzip.compress(data, mtime=0)).decode(),
    }
    ids = set(np.unique(np.concatenate([part.astype(np.int64).ravel() for part in wide])).tolist())
    return entry, ids


def token_texts(files: Mapping[str, bytes], ids: Iterable[int]) -> dict[int, str]:
    """Return the text of each token as it stands within a text; of a part of a character, the vocabulary's name."""
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode()) if "tokenizer.json" in files else None
    if tokenizer is None:
        return {index: f"[{index}]" for index in ids}
    anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    before = len(tokenizer.decode(anchor, skip_special_tokens=False))
    texts = {}
    for index in ids:
        text = tokenizer.decode([*anchor, index], skip_special_tokens=False)[before:]
        name = tokenizer.id_to_token(index)
        texts[index] = text if text and "\ufffd" not in text else f"[{index}]" if name is None else name
    return texts


def _steps(values: Array) -> Array:
    """Return values in nats as whole steps, int16."""
    steps = np.nan_to_num(np.rint(np.asarray(values, dtype=np.float64) * STEPS), nan=0, posinf=32767, neginf=-32768)
    return np.ascontiguousarray(np.clip(steps, -32768, 32767), dtype="<i2")


def _mean(values: Array) -> float:
    return round(float(values.mean()), 4) if len(values) else 0.0
