"""The mixin in transformers.Trainer: gradients of a step, accumulation, evaluation, exact resume, ranks, bad use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import logitcask as lc
from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import Batch
from tests.library.example_trainer import CacheTrainer
from tests.support.distilled import assert_close, dense_gradients, gradients, make_student, mixed_lengths
from tests.support.forked import on_two_ranks
from tests.support.tiny import make_tokenizer

ALPHA = 0.3
EXAMPLE = Path(__file__).with_name("example_trainer.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At ``cache`` a cache of 24 examples, at ``student`` a student."""
    place = tmp_path_factory.mktemp("mixin")
    mixed_lengths(place)
    make_student().save_pretrained(place / "student")
    make_tokenizer().save_pretrained(place / "student")
    return place


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, of which all have been summed."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found = self.found or gradients(model)


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    values = {"max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "logging_steps": 1,
              "use_cpu": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-3}  # fmt: skip
    return TrainingArguments(str(output), **{**values, **changes})


def trainer(
    folder: Path, output: Path, *callbacks: TrainerCallback, packed: bool = False, alpha: Any = ALPHA, **changes: Any
) -> Any:
    cache = lc.open(folder / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    return CacheTrainer(
        model, arguments(output, **changes), train_dataset=cache.dataset(), eval_dataset=cache.dataset(),
        data_collator=cache.collator(temperature=2.0, packed=packed), callbacks=list(callbacks),
        distillation=lc.Distillation(alpha=alpha),
    )  # fmt: skip


def first_batches(trainer: Any, count: int) -> list[Batch]:
    sampler = trainer._batches()
    return [trainer.data_collator([trainer.train_dataset[i] for i in rows]) for rows in list(sampler)[:count]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_has_the_gradient_of_the_dense_loss(
    folder: Path, tmp_path: Path, accumulation: int, packed: bool
) -> None:
    kept = Gradients()
    one = trainer(folder, tmp_path, kept, gradient_accumulation_steps=accumulation, packed=packed)
    expected, wanted = dense_gradients(one.model, first_batches(one, accumulation), ALPHA)
    one.train()
    assert_close(kept.found, wanted)
    line = one.state.log_history[0]
    assert line["total_loss"] == pytest.approx(expected, rel=1e-5)
    assert line["loss"] == pytest.approx(expected, rel=1e-3)


def test_alpha_on_a_line_over_the_steps(folder: Path, tmp_path: Path) -> None:
    one = trainer(folder, tmp_path, alpha=(0.8, 0.2), max_steps=3)
    one.train()
    lines = [line for line in one.state.log_history if "alpha" in line]
    assert [line["alpha"] for line in lines] == pytest.approx([0.8, 0.5, 0.2])
    for line in lines:
        total = line["alpha"] * line["hard_loss"] + (1 - line["alpha"]) * line["soft_loss"]
        assert line["total_loss"] == pytest.approx(total, rel=1e-5)
    found = one.evaluate()
    assert found["eval_loss"] == pytest.approx(0.2 * found["eval_hard_loss"] + 0.8 * found["eval_soft_loss"], rel=1e-5)


def test_evaluation_is_a_mean_over_positions(folder: Path, tmp_path: Path) -> None:
    one = trainer(folder, tmp_path, per_device_eval_batch_size=7, eval_strategy="steps", eval_steps=1,
                  load_best_model_at_end=True, save_strategy="steps", save_steps=1)  # fmt: skip
    batch = one.data_collator([one.train_dataset[i] for i in range(24)])
    expected, _ = dense_gradients(one.model, [batch], ALPHA)
    assert one.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    one.train()
    assert one.state.best_metric == min(line["eval_loss"] for line in one.state.log_history[1:] if "eval_loss" in line)
    both = one.evaluate({"a": one.train_dataset, "b": one.train_dataset})
    assert both["eval_a_loss"] == both["eval_b_loss"] < expected


def test_resumed_mid_epoch_it_is_the_same_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 5,
    }
    whole = trainer(folder, tmp_path / "whole", **options)
    whole.train()
    again = trainer(folder, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    lines = [[line["total_loss"] for line in t.state.log_history if "total_loss" in line] for t in (whole, again)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("packed", [False, True])
def test_each_shard_is_decoded_once_per_epoch(folder: Path, tmp_path: Path, packed: bool) -> None:
    one = trainer(folder, tmp_path, max_steps=-1, num_train_epochs=1, packed=packed, eval_strategy="no")
    one.train()
    shards = len(lc.open(folder / "cache").reader.shard_starts) - 1
    assert shards >= 5
    assert one.train_dataset.decodes == shards


def test_the_example_on_two_ranks_is_one_with_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    """With a last step per epoch that has examples for one rank only; the example's batch is eight."""
    words = [folder / "cache", folder / "student", tmp_path / "two"]
    on_cpu = {"ACCELERATE_USE_CPU": "true"}  # or the Trainer joins ranks on accelerators only
    ran = on_two_ranks(tmp_path, words, module=str(EXAMPLE), environment=on_cpu)
    assert ran.returncode == 0, ran.stderr[-3000:]
    two = load_file(tmp_path / "two/model.safetensors")
    whole = arguments(tmp_path, per_device_train_batch_size=16, max_steps=-1, num_train_epochs=2, max_grad_norm=1.0)
    cache = lc.open(folder / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CacheTrainer(model, whole, train_dataset=cache.dataset(), data_collator=cache.collator(),
                 distillation=lc.Distillation(alpha=0.1)).train()  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert (two[name] - tensor).norm() <= 1e-3 * (tensor - start[name]).norm() + 1e-12, name


BAD: list[tuple[Callable[[Any], dict[str, Any]], str]] = [
    (lambda cache: {"train_dataset": [1, 2]}, "train_dataset must be cache.dataset(), got list"),
    (lambda cache: {"data_collator": None}, "data_collator must be cache.collator"),
    (lambda cache: {"compute_metrics": print}, "compute_metrics takes logits of the whole vocabulary"),
    (lambda cache: {"model": make_student(200)}, "the model's vocabulary has 200 tokens and the labels need 300"),
    (lambda cache: {"model_init": make_student}, "model_init makes models that lack the loss: give model"),
]


@pytest.mark.parametrize(("change", "line"), BAD)
def test_bad_use(folder: Path, tmp_path: Path, change: Callable[[Any], dict[str, Any]], line: str) -> None:
    cache = lc.open(folder / "cache")
    given = {"model": make_student(), "args": arguments(tmp_path), "train_dataset": cache.dataset(),
             "data_collator": cache.collator(), **change(cache)}  # fmt: skip
    with pytest.raises(LogitcaskError) as caught:
        CacheTrainer(**given)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing_factor", 0.1), ("dataloader_drop_last", True), ("auto_find_batch_size", True),
     ("train_sampling_strategy", "group_by_length")],
)  # fmt: skip
def test_what_the_trainer_does_to_its_own_loss_and_batches_is_refused(
    folder: Path, tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(LogitcaskError, match=f"{name}={value!r} does not apply to a cache"):
        trainer(folder, tmp_path, **{name: value})


def test_several_gpus_in_one_process_are_refused(folder: Path, tmp_path: Path) -> None:
    cache, seen = lc.open(folder / "cache"), arguments(tmp_path)
    assert seen.n_gpu <= 1
    seen._n_gpu = 2  # as where two are visible
    with pytest.raises(LogitcaskError, match=r"2 GPUs in one process.* start with torchrun"):
        CacheTrainer(make_student(), seen, cache.collator(), train_dataset=cache.dataset())
    with pytest.raises(LogitcaskError, match="give train_dataset and what follows it by name"):
        CacheTrainer(make_student(), arguments(tmp_path), cache.collator(), cache.dataset())


@pytest.mark.parametrize(
    ("distillation", "line"),
    [
        (lc.Distillation(temperature=1.5), "temperature is 1.5, but the batch's labels are at 2"),
        (lc.Distillation(divergence="jsd"), "requires labels of tail='bucket'"),
    ],
)
def test_settings_that_do_not_fit_the_labels(folder: Path, tmp_path: Path, distillation: Any, line: str) -> None:
    cache = lc.open(folder / "cache")
    one = CacheTrainer(make_student(), arguments(tmp_path), train_dataset=cache.dataset(),
                       data_collator=cache.collator(temperature=2.0), distillation=distillation)  # fmt: skip
    with pytest.raises(LogitcaskError, match=line):
        one.train()
    with pytest.raises(LogitcaskError, match="predict returns logits"):
        one.predict(cache.dataset())


def test_kd_loss_in_a_trainer_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """Without the mixin, remove_unused_columns or not: the loss is right, the order is the Trainer's."""

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
            loss: Tensor = lc.kd_loss(model, inputs, alpha=ALPHA)
            return loss

    cache = lc.open(folder / "cache")
    one = Own(make_student(), arguments(tmp_path, remove_unused_columns=True), train_dataset=cache.dataset(),
              data_collator=cache.collator())  # fmt: skip
    assert 0 < one.train().training_loss < 20
