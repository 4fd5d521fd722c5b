"""The loss is part of the student's forward: a wrapper sees an ordinary module and returns the same loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Batch, Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.train.loss import make_loss_forward
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import make_cache

LOSS = LossSettings(alpha=0.5, temperature=2.0, tail="sampled", divergence="forward-kl")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("wrappers"))


@pytest.fixture(scope="module")
def batch(cache: Path) -> Batch:
    source = CacheExamples(str(cache), with_targets=True)
    return Collator(0, tuple(source.reader.manifest.label.temperatures), 2.0, "sampled")([source[i] for i in range(6)])


@pytest.fixture
def student(cache: Path, tmp_path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    label = CacheReader(cache).manifest.label
    model = student_from_config(write_config(tmp_path / "student.json", STUDENT), label.vocab_size)
    make_loss_forward(model, LOSS)
    return model


def loss_and_gradients(model: Any, named: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    named.zero_grad()
    total = model(**batch).total
    torch.autograd.backward(total)
    return total.detach(), {name: p.grad.clone() for name, p in named.named_parameters() if p.grad is not None}


def test_torch_compile(student: PreTrainedModel, batch: Batch) -> None:
    expected = loss_and_gradients(student, student, batch)
    torch._dynamo.reset()
    compiled = loss_and_gradients(torch.compile(student, backend="aot_eager"), student, batch)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing(student: PreTrainedModel, batch: Batch) -> None:
    expected = loss_and_gradients(student.train(), student, batch)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(loss_and_gradients(student, student, batch), expected)


def test_lora(student: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    """Adapters start at zero, so the loss is the student's; only they have gradients, and they learn."""
    expected, whole = loss_and_gradients(student, student, batch)
    adapted = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    total, gradients = loss_and_gradients(adapted, student, batch)
    torch.testing.assert_close(total, expected)
    assert gradients
    assert all("lora" in name for name in gradients)
    assert not gradients.keys() & whole.keys()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(adapted(**batch).total)
        optimizer.step()
    assert float(adapted(**batch).total.detach()) < float(expected)
    wrapped: Any = adapted
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        logits = merged(input_ids=batch["input_ids"]).logits
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=batch["input_ids"]).logits, logits)
