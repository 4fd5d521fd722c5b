"""On a CPU a batch is trained on some rows after the other: the same loss and gradients, one part's activations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import logitcask as lc
from logitcask.pipeline.batches.collate import Batch, in_parts
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.models.shapes import shape_of_size
from logitcask.pipeline.train.callbacks.nonfinite import StopOnNonFinite
from logitcask.pipeline.train.loss import make_loss_forward
from logitcask.pipeline.train.memory_advice import StepSize
from logitcask.pipeline.train.selection import Selection
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.models.test_router_loss import MIXTRAL
from tests.support.distilled import make_student, mixed_lengths
from tests.support.runs import losses, train, weights, write_config
from tests.support.tiny import make_cache

EXAMPLES = (0, 9, 17, 3, 21, 1)
HOW = LossSettings(alpha=0.5, temperature=2.0, tail="sampled", divergence="forward-kl")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_lengths(tmp_path_factory.mktemp("mixed"))


def make_batch(cache: Path, *, packed: bool, replay: bool = False) -> Batch:
    """Return a batch of which every other example lacks labels with ``replay``."""
    opened = lc.open(cache)
    data, collate = opened.dataset(), opened.collator(2.0, packed=packed)
    examples = [data[i] for i in EXAMPLES]
    batch = collate(examples)
    assert ("position_ids" in batch) == packed
    if replay:
        counts = [int(example.encoded.target_mask.sum()) for example in examples]
        labelled = torch.cat([torch.full((n,), i % 2 == 0) for i, n in enumerate(counts)])
        batch |= {"labelled": labelled, "soft_labels": batch["soft_labels"].map(lambda part: part[labelled])}
    return batch


def loss_and_gradient(batches: list[Batch], selection: Selection | None = None) -> tuple[Tensor, Tensor]:
    student = make_student().train()
    make_loss_forward(student, HOW, selection=selection)
    extra = {} if selection is None else {"soft_scale": 2.0}
    total = torch.stack([_backward(student(**batch, **extra).total) for batch in batches]).sum()
    return total, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def _backward(total: Tensor) -> Tensor:
    torch.autograd.backward(total)
    return total.detach()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["labels", "replay", "selection"])
def test_parts_have_the_loss_and_gradient_of_the_batch(mixed: Path, packed: bool, kind: str) -> None:
    batch = make_batch(mixed, packed=packed, replay=kind == "replay")
    rows, length = batch["input_ids"].shape
    parts = in_parts(batch, length)
    assert len(parts) == rows > 2
    for part in parts:
        ids = part["input_ids"].flatten()
        assert torch.equal(ids[part["target_index"] + 1], part["gold"])
        assert part["slots"].tolist() == [int(part["is_token"].sum()), part["is_token"].numel()]
        assert part["is_token"][:, -1].any(), "padding that no row needs is cut off"
    assert sum(int(part["slots"][0]) for part in parts) == int(batch["slots"][0])
    assert sum(len(part["gold"]) for part in parts) == len(batch["gold"])
    selection = Selection("teacher-entropy", 0.5) if kind == "selection" else None
    whole, gradient = loss_and_gradient([batch], selection)
    for places in (length, 2 * length, 3 * length):
        loss, sum_of_parts = loss_and_gradient(in_parts(batch, places), selection)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(sum_of_parts, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_a_batch_that_fits_is_one_part(mixed: Path) -> None:
    batch = make_batch(mixed, packed=False)
    assert in_parts(batch, batch["input_ids"].numel()) == [batch]
    assert in_parts(batch | {"both_sides": ()}, 1) == [batch | {"both_sides": ()}]


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, {"select": "entropy:0.5"}, {"labels": "exact"}, {"labels": "none"}],
    ids=str,
)
def test_a_run_in_parts_is_the_same(
    cache: Path, options: dict[str, Any], tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**options, "max_steps": 3, "save_steps": 3, "alpha": 0.5} | changes
    source: Path | None = cache
    if labels := how.pop("labels", None):
        source = make_cache(tmp_path, preset="exact", head_size=4, tail_draws=0)
    if labels == "none":  # the teacher is in memory
        source, data = None, {"train_data": str(tmp_path / "train.jsonl"), "max_seq_length": 64}
        how |= {**data, "teacher_model": str(tmp_path / "teacher")}
    whole = train(source, tmp_path / "whole", **how)
    given, compute = list[int](), DistillationTrainer.compute_loss

    def counted(trainer: Any, model: Any, inputs: Batch, *args: Any, **named: Any) -> Any:
        given.append(len(inputs["input_ids"]))
        return compute(trainer, model, inputs, *args, **named)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", counted)
    monkeypatch.setattr("logitcask.pipeline.train.trainer.CPU_PART", 1)
    parts = train(source, tmp_path / "parts", **how)
    assert set(given) == {1}
    assert len(given) > 3 * how.get("gradient_accumulation_steps", 1)
    for name in ("total_loss", "hard_loss", "soft_loss", "grad_norm"):
        assert losses(parts, name) == pytest.approx(losses(whole, name), rel=1e-4), name
    ends = weights(parts / "final")
    for name, tensor in weights(whole / "final").items():
        torch.testing.assert_close(ends[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_loss_of_a_step_is_that_of_all_its_parts(
    cache: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, note = list[float](), StopOnNonFinite.note_loss

    def kept(check: StopOnNonFinite, loss: Tensor) -> None:
        noted.append(float(loss))
        note(check, loss)

    monkeypatch.setattr(StopOnNonFinite, "note_loss", kept)
    monkeypatch.setattr("logitcask.pipeline.train.trainer.CPU_PART", 1)
    run = train(cache, tmp_path / "run", **{**options, "max_steps": 3, "save_steps": 3})
    assert noted == pytest.approx(losses(run), rel=1e-5)


def test_a_mixture_of_experts_takes_a_batch_whole(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = write_config(tmp_path / "student.json", MIXTRAL)
    how: dict[str, Any] = {"student_config": student, "max_steps": 2, "save_steps": 2, "batch_size": 4}
    whole = train(cache, tmp_path / "whole", **how)
    monkeypatch.setattr("logitcask.pipeline.train.trainer.CPU_PART", 1)
    assert losses(train(cache, tmp_path / "run", **how), "aux_loss") == losses(whole, "aux_loss")


def test_the_estimate_of_memory_is_that_of_a_part() -> None:
    step = StepSize(
        student=shape_of_size("100M"), longest=512, on_cpu=True, batch_size=8, accumulation=1, checkpointing=False,
        mixed=False, from_cache=True, in_parts=True,
    )  # fmt: skip
    assert step.memory() == replace(step, batch_size=2, in_parts=False).memory()
    assert replace(step, longest=4096).memory() == replace(step, longest=4096, batch_size=1).memory()
    assert not any("--batch-size" in words for words in step.savings())
