"""Codes of hidden states for exact labels: bytes per position, and the error of what they stand for.

Real SmolLM2 states of Python and English; bases are fitted on one half of each text, and all figures are of the other.
Bytes are those of the arrays of a cache, head included. The errors are the mean KL(teacher || label), and of the mean
gradient of a half-trained linear student (q = softmax(z / 2T)) over ``MEASURED`` positions, relative to the exact one's
norm, through the head in bfloat16; beside them that of sparse labels, root mean square over ``DRAWS``.
Run as ``python -m tests.benchmarks.exact_codes RESULTS.json [STATES.npz]``; states are kept in that file, or read from
it. About three minutes on a core, as much again without states.

Predicted before the run: the fitted basis needs half the bytes of a rotation at the same error, 4 bits keep the
gradient's error below 0.02 at T=1 and T=2 at 150 bytes, and 6 bits below 0.005 at 300; a width of random states costs
its share of 576.
"""

import glob
import json
import math
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import Zstd

from logitcask.cache.exact.head import TeacherHead, decode
from logitcask.cache.labels import ExactTargets, FloatArray, soft_labels
from logitcask.cache.layout import array_specs, decode_targets, encode_targets, stride_for, zarr_layout
from logitcask.cache.manifest import LabelSettings, ShardPlan
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.settings.precompute import PRESETS
from logitcask.pipeline.teachers.exact.coder import HiddenCoder
from logitcask.pipeline.teachers.exact.fit import fitted
from logitcask.pipeline.teachers.exact.heads import stored_head
from logitcask.pipeline.teachers.sparsify import sparsify
from logitcask.pipeline.text.tokenizer import load_tokenizer
from tests.benchmarks.capture import teacher_path

WINDOWS, LENGTH, SKIPPED = {"python": 14, "english": 10}, 256, 16
MEASURED, SLICE = 300, 64
DRAWS = 8  # of a sparse label
RANDOM, LOGITS = (256, 512), 3.0  # widths of random states, and the standard deviation of their logits
TEMPERATURES = [1.0, 1.5, 2.0]
BETWEEN = (1.25, 3.0)  # measured too: the nearest stored temperature gives the offset of the tail
CPU = torch.device("cpu")


def texts() -> dict[str, list[str]]:
    """Return Python modules and the language's manual."""
    modules = [
        Path(file).read_text(errors="ignore") for file in sorted(glob.glob(f"{os.path.dirname(os.__file__)}/*.py"))
    ]
    return {"python": modules, "english": [topics[name] for name in sorted(topics)]}


def states(file: str | None) -> dict[str, FloatArray]:
    """Return hidden states by text, and the weights of the head."""
    if file and Path(file).exists():
        return dict(np.load(file))
    tokenizer, model = load_tokenizer(teacher_path()), load_causal_lm(teacher_path(), dtype=torch.float32).eval()
    chance, found = random.Random(0), {"weight": read_head(model).weight.detach().numpy()}
    for name, pieces in texts().items():
        chance.shuffle(pieces)
        ids = [ids for text in pieces if len(ids := tokenizer(text)["input_ids"]) > LENGTH][: WINDOWS[name]]
        with torch.inference_mode():
            rows = [last_hidden_states(model, torch.tensor([each[:LENGTH]]))[0, SKIPPED:].numpy() for each in ids]
        found[name] = np.concatenate(rows)
    if file:
        arrays: dict[str, Any] = dict(found)
        np.savez(file, **arrays)
    return found


def labels_of(head: TeacherHead, weight: FloatArray, hidden: FloatArray, exact: LabelSettings) -> ExactTargets:
    """Return the labels of hidden states that a head of these weights reads, before they are coded into arrays."""
    coder, parts, weights = HiddenCoder(head, exact, CPU), [], torch.from_numpy(weight)
    for first in range(0, len(hidden), SLICE):
        rows = hidden[first : first + SLICE]
        gold, uniforms = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), 0)
        z_NV = torch.from_numpy(rows) @ weights.t()
        sparse = sparsify(z_NV, gold, uniforms, exact.head_size, exact.temperatures)
        parts.append(coder.encode(torch.from_numpy(rows), sparse))
    joined = ExactTargets.concatenate(parts)
    assert isinstance(joined, ExactTargets)
    return joined


def stored(targets: ExactTargets, label: LabelSettings) -> tuple[ExactTargets, dict[str, float]]:
    """Return the labels as they are read back, and their bytes per position by array."""
    plan = ShardPlan(count=1, examples=1, tokens=1, positions=stride_for("position", len(targets)), digest="0" * 64)
    root, sizes, coded = zarr.create_group(zarr.storage.MemoryStore()), {}, encode_targets(targets, label)
    for spec in (spec for spec in array_specs(label) if spec.axis == "position"):
        array = root.create_array(spec.name, **zarr_layout(spec, plan), fill_value=0)
        array[:] = coded[spec.name] = coded[spec.name].astype(spec.dtype)
        sizes[spec.name] = array.nbytes_stored() / len(targets)
    read = decode_targets(coded, label)
    assert isinstance(read, ExactTargets)
    return read, sizes


def distribution(targets: ExactTargets, z_NV: FloatArray, t: float) -> FloatArray:
    """Return what labels stand for at a temperature, (N, V), from rebuilt logits."""
    j = int(np.abs(np.log(np.array(TEMPERATURES) / t)).argmin())
    near = TEMPERATURES[j]
    ids = targets.head_ids.astype(np.int64)
    tail = z_NV.copy()
    np.put_along_axis(tail, ids, -np.inf, 1)
    wanted = targets.log_partition[:, j] + targets.log_tail_mass[:, j]  # log of the tail's sum at the stored one
    offset = near * (wanted - np.logaddexp.reduce(tail / near, axis=1))
    tail += offset[:, None]
    np.put_along_axis(tail, ids, targets.head_logprobs, 1)
    p: FloatArray = np.exp(tail / t - np.logaddexp.reduce(tail / t, axis=1)[:, None]).astype(np.float32)
    return p


@dataclass(frozen=True)
class Truth:
    """The teacher's distribution at a temperature, (N, V), and the norm of the exact gradient."""

    p: FloatArray
    norm: float


def truths(true_NV: FloatArray, hidden: FloatArray) -> dict[float, Truth]:
    """Return what labels are compared with, by temperature."""
    found = {}
    for t in (*TEMPERATURES, *BETWEEN):
        p = softmax(true_NV / t)
        found[t] = Truth(p, float(np.linalg.norm((softmax(true_NV / (2 * t)) - p).T @ hidden)))
    return found


def errors(targets: ExactTargets, z_NV: FloatArray, hidden: FloatArray, true: dict[float, Truth]) -> dict[str, Any]:
    """Return the KL and the gradient's error at each temperature."""
    figures: dict[str, Any] = {}
    for t, truth in true.items():
        p, ours = truth.p, distribution(targets, z_NV, t)
        ratio = np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(ours, 1e-30))
        kl = float((p * ratio).sum(1, dtype=np.float64).mean())
        figures[f"T={t:g}"] = {"kl": kl, "gradient": float(np.linalg.norm((p - ours).T @ hidden)) / truth.norm}
    return figures


def sparse_errors(preset: str, true_NV: FloatArray, hidden: FloatArray, true: dict[float, Truth]) -> dict[str, float]:
    """Return the error of the gradient by a preset's labels at each stored temperature, before they are stored."""
    head, draws = PRESETS[preset]
    z_NV, gold = torch.from_numpy(true_NV), torch.zeros(len(true_NV), dtype=torch.long)
    squares: dict[float, list[float]] = {t: [] for t in TEMPERATURES}
    for seed in range(DRAWS):
        uniforms = torch.rand(len(z_NV), draws, generator=torch.Generator().manual_seed(seed))
        targets = sparsify(z_NV, gold, uniforms, head, TEMPERATURES)
        for t, found in squares.items():
            label, ours = soft_labels(targets, TEMPERATURES, t, "sampled"), np.zeros_like(true_NV)
            np.add.at(ours, (np.arange(len(ours))[:, None], label.ids), label.weights)
            found.append((float(np.linalg.norm((true[t].p - ours).T @ hidden)) / true[t].norm) ** 2)
    return {f"T={t:g}": float(np.mean(found) ** 0.5) for t, found in squares.items()}


def softmax(z: FloatArray) -> FloatArray:
    """Return softmax over rows."""
    p = np.exp(z - z.max(1, keepdims=True))
    normal: FloatArray = p / p.sum(1, keepdims=True)
    return normal


def rotated(hidden: FloatArray, bits: int) -> tuple[FloatArray, float]:
    """Return hidden states after a rotation, one scale per position, and the bytes that zstd needs for them."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((hidden.shape[1],) * 2))
    turned = hidden @ turn.astype(np.float32)
    scale = np.abs(turned).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    codes = np.rint(turned / scale).astype(np.int8)
    size = len(Zstd(level=9).encode(np.ascontiguousarray(codes.T).tobytes())) / len(codes) + 2
    return (codes * scale) @ turn.T.astype(np.float32), size


def random_states(width: int) -> dict[str, Any]:
    """Return the bytes of random hidden states, which no basis makes smaller, at 4 bits."""
    chance = np.random.default_rng(width)
    weight = (LOGITS * chance.standard_normal((8192, width)) / math.sqrt(width)).astype(np.float32)
    plain = stored_head(LMHead(torch.from_numpy(weight), None, 1.0, None), len(weight))
    hidden = chance.standard_normal((3 * width, width)).astype(np.float32)
    label = LabelSettings(vocab_size=8192, head_size=8, tail_draws=0, temperatures=TEMPERATURES, seed=0)
    head, code = fitted(plain, hidden[: 2 * width], label, 4)
    exact = label.model_copy(update={"exact": code})
    _, sizes = stored(labels_of(head, weight, hidden[2 * width :], exact), exact)
    return {"hidden": sum(size for name, size in sizes.items() if name.startswith("hidden_")), "columns": code.columns}


def main() -> None:
    """Measure, and write the figures."""
    found = states(sys.argv[2] if len(sys.argv) > 2 else None)
    weight = found.pop("weight")
    halves = [(each[: len(each) // 2], each[len(each) // 2 :]) for each in found.values()]
    known, unknown = (np.concatenate([half[i] for half in halves]) for i in (0, 1))
    chosen = np.random.default_rng(0).choice(len(unknown), MEASURED, replace=False)
    hidden = unknown[chosen]
    true = truths(hidden @ weight.T, hidden)
    label = LabelSettings(vocab_size=len(weight), head_size=8, tail_draws=0, temperatures=TEMPERATURES, seed=0)
    plain = stored_head(LMHead(torch.from_numpy(weight), None, 1.0, None), len(weight))
    rows: dict[str, Any] = {}
    for bits in (4, 6, 5, 3):
        head, code = fitted(plain, known, label, bits)
        exact = label.model_copy(update={"exact": code})
        read, sizes = stored(labels_of(head, weight, unknown, exact), exact)
        part = read[chosen]
        assert isinstance(part, ExactTargets)
        rows[f"fitted, {bits} bits"] = {
            "bytes": sum(sizes.values()),
            "by array": sizes,
            "columns": list(code.columns),
            **errors(part, head.logits(decode(part, head)), hidden, true),
        }
        print(bits, json.dumps(rows[f"fitted, {bits} bits"]), flush=True)
        beside = sum(size for name, size in sizes.items() if not name.startswith("hidden_"))
    for bits in (4,):
        rebuilt, size = rotated(unknown, bits)
        rows[f"rotated, {bits} bits"] = {
            "bytes": size + beside, **errors(part, rebuilt[chosen] @ weight.T, hidden, true)
        }  # fmt: skip
        print(bits, json.dumps(rows[f"rotated, {bits} bits"]), flush=True)
    wide = {str(width): random_states(width) for width in RANDOM}
    print(json.dumps(wide), flush=True)
    sparse = {name: sparse_errors(name, hidden @ weight.T, hidden, true) for name in ("lean", "standard", "rich")}
    print(json.dumps(sparse), flush=True)
    about = {"fitted on": len(known), "coded": len(unknown), "measured": MEASURED, "teacher": "SmolLM2, width 576"}
    Path(sys.argv[1]).write_text(
        json.dumps({**about, "codes": rows, "random states": wide, "sparse": sparse}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
