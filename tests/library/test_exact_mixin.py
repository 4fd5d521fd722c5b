"""The mixin on exact labels: the gradient of a step by the teacher itself, resuming, what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import logitcask as lc
from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import Batch
from tests.library.example_trainer import CacheTrainer
from tests.library.test_mixin import Gradients, arguments, first_batches
from tests.support.distilled import assert_close, gradients, make_student
from tests.support.tiny import make_cache

ALPHA, T = 0.3, 3.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At ``cache`` exact labels of a ``teacher``."""
    place = tmp_path_factory.mktemp("exact mixin")
    make_cache(place, preset="exact", tail_draws=0, hidden_bits=8)
    return place


def trainer(folder: Path, output: Path, *callbacks: Any, packed: bool = False, **changes: Any) -> Any:
    cache = lc.open(folder / "cache")
    return CacheTrainer(
        make_student(), arguments(output, **changes), train_dataset=cache.dataset(), eval_dataset=cache.dataset(),
        data_collator=cache.collator(temperature=T, packed=packed), callbacks=list(callbacks),
        distillation=lc.Distillation(alpha=ALPHA, divergence="reverse-kl"),
    )  # fmt: skip


def loss_by_the_teacher(model: Any, folder: Path, batches: list[Batch]) -> Tensor:
    """Return the mean loss over all batches' positions from both models' logits, in float64."""
    models = (model, AutoModelForCausalLM.from_pretrained(folder / "teacher"))
    total, count = torch.zeros((), dtype=torch.float64), sum(len(batch["gold"]) for batch in batches)
    for batch in batches:
        positions = {name: batch[name] for name in ("position_ids",) if name in batch}
        z, of_teacher = (
            each(input_ids=batch["input_ids"], use_cache=False, **positions)
            .logits.double()
            .flatten(0, 1)[batch["target_index"]]
            for each in models
        )
        log_q, log_p = (z / T).log_softmax(1), (of_teacher.detach() / T).log_softmax(1)
        hard = -z.log_softmax(1).gather(1, batch["gold"][:, None]).sum()
        soft = T * T * (log_q.exp() * (log_q - log_p)).sum()
        total = total + (ALPHA * hard + (1 - ALPHA) * soft) / count
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_has_the_gradient_that_the_teacher_gives(folder: Path, tmp_path: Path, packed: bool) -> None:
    """Up to what 8 bits leave out; of three batches of the step, or one of several examples to a row."""
    kept, accumulation = Gradients(), 1 if packed else 3
    one = trainer(folder, tmp_path, kept, packed=packed, gradient_accumulation_steps=accumulation)
    model = make_student()
    expected = loss_by_the_teacher(model, folder, first_batches(one, accumulation))
    torch.autograd.backward(expected)
    one.train()
    assert_close(kept.found, gradients(model), relative=5e-3)
    assert one.state.log_history[0]["total_loss"] == pytest.approx(float(expected.detach()), rel=2e-3)
    whole = loss_by_the_teacher(
        one.model.eval(), folder, [one.data_collator([one.train_dataset[i] for i in range(24)])]
    )
    assert one.evaluate()["eval_loss"] == pytest.approx(float(whole.detach()), rel=2e-3)


def test_resumed_mid_epoch_it_is_the_same_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(folder, tmp_path / "whole", **options)
    whole.train()
    again = trainer(folder, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_another_temperature_than_the_labels(folder: Path, tmp_path: Path) -> None:
    cache = lc.open(folder / "cache")
    one = CacheTrainer(make_student(), arguments(tmp_path), train_dataset=cache.dataset(),
                       data_collator=cache.collator(T), distillation=lc.Distillation(temperature=1.5))  # fmt: skip
    with pytest.raises(LogitcaskError, match=r"temperature is 1.5, but the batch's labels are at 3.3"):
        one.train()
