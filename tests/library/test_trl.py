"""The mixin in TRL's SFTTrainer, with and without peft: gradients of a step, checkpoints, evaluation, the example."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig

import logitcask as lc
from logitcask.cache.errors import LogitcaskError
from tests.library.example_trl import CacheTrainer
from tests.library.test_mixin import ALPHA, Gradients, first_batches
from tests.support.distilled import assert_close, dense_gradients, make_student, mixed_lengths
from tests.support.forked import ran
from tests.support.tiny import make_tokenizer

LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
EXAMPLE = Path(__file__).with_name("example_trl.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trl")
    mixed_lengths(place)
    make_student().save_pretrained(place / "student")
    make_tokenizer().save_pretrained(place / "student")
    return place


def trainer(
    folder: Path, output: Path, peft_config: LoraConfig | None, *callbacks: TrainerCallback, **changes: Any
) -> Any:
    cache = lc.open(folder / "cache")
    values = {"max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "logging_steps": 1, "bf16": False,
              "use_cpu": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-3}  # fmt: skip
    return CacheTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"), SFTConfig(str(output), **{**values, **changes}),
        train_dataset=cache.dataset(), eval_dataset=cache.dataset(), data_collator=cache.collator(temperature=2.0),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"), callbacks=list(callbacks),
        peft_config=peft_config, distillation=lc.Distillation(alpha=ALPHA),
    )  # fmt: skip


@pytest.mark.parametrize("peft_config", [None, LORA])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_has_the_gradient_of_the_dense_loss(
    folder: Path, tmp_path: Path, peft_config: LoraConfig | None, checkpointing: bool
) -> None:
    kept = Gradients()
    one = trainer(folder, tmp_path, peft_config, kept, gradient_accumulation_steps=2,
                  gradient_checkpointing=checkpointing)  # fmt: skip
    expected, wanted = dense_gradients(one.model, first_batches(one, 2), ALPHA)
    one.train()
    assert all("lora" in name for name in wanted) == (peft_config is not None)
    assert_close(kept.found, wanted)
    assert one.state.log_history[0]["total_loss"] == pytest.approx(expected, rel=1e-5)
    assert one.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_resumed_it_is_the_same(folder: Path, tmp_path: Path, peft_config: LoraConfig | None) -> None:
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
                               "eval_steps": 2}  # fmt: skip
    whole = trainer(folder, tmp_path / "whole", peft_config, **options)
    whole.train()
    again = trainer(folder, tmp_path / "again", peft_config, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert whole.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
    evaluations = [line["eval_loss"] for line in whole.state.log_history if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0]


def test_the_example(folder: Path, tmp_path: Path) -> None:
    done = ran(tmp_path, [folder / "cache", folder / "student", tmp_path / "out"], [{}], module=str(EXAMPLE))
    assert done.returncode == 0, done.stderr[-3000:]
    adapter = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    student = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    cache = lc.open(folder / "cache")
    dataset, collate = cache.dataset(), cache.collator(temperature=1.0)
    batch = collate([dataset[i] for i in range(24)])
    before = AutoModelForCausalLM.from_pretrained(folder / "student")
    with torch.no_grad():
        assert lc.kd_loss(student, batch) < lc.kd_loss(before, batch)


@pytest.mark.parametrize(
    "change", [{"loss_type": "dft"}, {"completion_only_loss": True}, {"assistant_only_loss": True}]
)
def test_losses_of_trl_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(LogitcaskError, match=f"{name}={value!r} does not apply to a cache"):
        trainer(folder, tmp_path, None, **change)


def test_packing_is_the_collators(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match="packing and padding_free do not apply to a cache") as caught:
        trainer(folder, tmp_path, None, packing=True)
    assert "\n" not in str(caught.value)
