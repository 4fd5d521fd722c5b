"""What a label costs and what it is worth: bytes per position, and the angle of a student's gradient to exact KD.

Real SmolLM2 labels of Python functions, a tiny student, forward KL alone; the exact gradient uses the teacher's full
distribution. Each preset is measured as drawn and as it comes back from the cache, so that the difference is what
quantisation adds. Run as ``python -m tests.benchmarks.fidelity [STUDENT_FOLDER]`` (about seven minutes on two cores);
without a folder the student is new.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.labels import SparseTargets, soft_labels
from logitcask.cache.layout import array_specs, decode_targets, encode_targets, stride_for, zarr_layout
from logitcask.cache.manifest import LabelSettings, ShardPlan
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.models.head import last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.losses import LossSettings, distillation_loss
from logitcask.pipeline.teachers.sparsify import sparsify, uniform_draws
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import read_records
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size
from tests.benchmarks.capture import teacher_path

EXAMPLES, LENGTH, ROWS = 24, 256, 64
TEMPERATURES = [1.0, 1.5, 2.0]
PRESETS = {"head 4 + tail 8": (4, 8), "head 8 + tail 24": (8, 24), "head 32 + tail 64": (32, 64)}


Loss = Callable[[Tensor, slice], Tensor]  # logits (n, V) of a slice of positions -> their summed loss


@dataclass(frozen=True)
class Positions:
    """Real text under the teacher: tokens and target positions per example, logits (N, V) and gold (N,) of all."""

    ids: list[Tensor]
    at: list[Tensor]
    logits_NV: Tensor
    gold_N: Tensor
    vocab_size: int


def real_positions() -> Positions:
    """Run the teacher over Python functions of the standard library."""
    tokenizer = load_tokenizer(teacher_path())
    with tempfile.TemporaryDirectory() as folder:
        written = from_source(None, Path(folder), EXAMPLES, seed=0)
        encoder = Encoder(tokenizer, prompt_loss=False)
        records = [record for _, record in read_records([str(written.path)]) if isinstance(record, dict)]
        found = [example for record in records for example in encoder.examples(record)]
    model = load_causal_lm(teacher_path(), dtype=torch.float32).eval()
    ids = [torch.from_numpy(example.input_ids[:LENGTH]) for example in found]
    at = [torch.from_numpy(np.flatnonzero(example.target_mask[: LENGTH - 1])) for example in found]
    at = [places[places < len(tokens) - 1] for places, tokens in zip(at, ids, strict=True)]
    with torch.inference_mode():
        logits = [model(tokens[None]).logits[0, places].clone() for tokens, places in zip(ids, at, strict=True)]
    gold = [tokens[places + 1] for tokens, places in zip(ids, at, strict=True)]
    return Positions(ids, at, torch.cat(logits), torch.cat(gold), tokenizer_size(tokenizer))


def gradient(student: PreTrainedModel, where: Positions, loss: Loss) -> Tensor:
    """Return the student's parameter gradient, flattened, of the loss summed over all positions."""
    student.zero_grad()
    head, first = read_head(student), 0
    for tokens, places in zip(where.ids, where.at, strict=True):
        rows = slice(first, first + len(places))
        torch.autograd.backward(loss(head.logits(last_hidden_states(student, tokens[None])[0, places]), rows))
        first += len(places)
    return torch.cat([p.grad.reshape(-1).double() for p in student.parameters() if p.grad is not None])


def label_all(where: Positions, head: int, draws: int) -> SparseTargets:
    """Return the teacher's sparse labels as drawn, before they are encoded."""
    uniforms = torch.from_numpy(uniform_draws(0, 0, len(where.gold_N), draws))
    slices = [slice(first, first + ROWS) for first in range(0, len(where.gold_N), ROWS)]
    return SparseTargets.concatenate(
        [sparsify(where.logits_NV[s], where.gold_N[s], uniforms[s], head, TEMPERATURES) for s in slices]
    )


def stored(targets: SparseTargets, label: LabelSettings) -> tuple[SparseTargets, float]:
    """Return the labels as they are read back from the cache, and their bytes per position."""
    plan = ShardPlan(count=1, examples=1, tokens=1, positions=stride_for("position", len(targets)), digest="0" * 64)
    root, size = zarr.create_group(zarr.storage.MemoryStore()), 0
    coded = encode_targets(targets)
    for spec in (spec for spec in array_specs(label) if spec.axis == "position"):
        array = root.create_array(spec.name, **zarr_layout(spec, plan), fill_value=0)
        whole = np.zeros(array.shape, dtype=spec.dtype)
        whole[: len(targets)] = coded[spec.name]
        array[:] = whole
        size += array.nbytes_stored()
        coded[spec.name] = whole[: len(targets)]
    return decode_targets(coded, label), size / len(targets)


def sparse_loss(targets: SparseTargets, head: int, temperature: float, tail: str) -> Loss:
    """Return the loss: forward KL against sparse labels, times T^2."""
    soft = soft_labels(targets, TEMPERATURES, temperature, tail)
    settings = LossSettings(alpha=0.0, temperature=temperature, tail=tail, divergence="forward-kl")

    def loss(logits: Tensor, rows: slice) -> Tensor:
        labels = soft[rows].map(torch.from_numpy)
        gold = torch.zeros(len(logits), dtype=torch.long)
        return distillation_loss(logits, gold, labels, settings).total

    return loss


def exact_loss(where: Positions, temperature: float) -> Loss:
    """Return the loss: forward KL against the teacher's full distribution, times T^2."""

    def loss(logits: Tensor, rows: slice) -> Tensor:
        p = (where.logits_NV[rows].double() / temperature).softmax(1).float()
        return -(temperature**2) * (p * functional.log_softmax(logits / temperature, dim=1)).sum()

    return loss


def degrees(one: Tensor, other: Tensor) -> float:
    """Return the angle between two gradients."""
    cosine = float(one @ other / (one.norm() * other.norm()))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def main() -> None:
    """Print the table."""
    where = real_positions()
    if len(sys.argv) > 1:
        student = load_causal_lm(sys.argv[1], dtype=torch.float32)
    else:
        torch.manual_seed(0)
        values = json.loads(Path("configs/students/tiny.json").read_text())
        config = AutoConfig.for_model(values.pop("model_type"), vocab_size=where.vocab_size, **values)
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    exact = {t: gradient(student, where, exact_loss(where, t)) for t in TEMPERATURES}
    print(f"{len(where.gold_N)} positions; degrees to the exact gradient, as drawn / as stored")
    print(f"{'label':22s}{'bytes':>7s}" + "".join(f"{f'T={t:g}':>17s}" for t in TEMPERATURES))
    for name, (head, draws) in {**PRESETS, "top-64 renormalised": (64, 0)}.items():
        label = LabelSettings(
            vocab_size=where.vocab_size, head_size=head, tail_draws=draws, temperatures=TEMPERATURES, seed=0
        )
        drawn = label_all(where, head, draws)
        back, size = stored(drawn, label)
        tail = "sampled" if draws else "renormalize"
        cells = []
        for t in TEMPERATURES:
            angles = [degrees(gradient(student, where, sparse_loss(x, head, t, tail)), exact[t]) for x in (drawn, back)]
            cells.append(f"{angles[0]:8.2f} /{angles[1]:7.2f}")
        print(f"{name:22s}{size:7.1f}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
