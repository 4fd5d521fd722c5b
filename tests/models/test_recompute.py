"""Layers that save only the results of products: same losses and gradients, fewer bytes saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.recompute import _contexts, keep_products_only
from tests.support.runs import STUDENT, write_config
from tests.train.test_train import ARCHITECTURES

DROPOUT: dict[str, dict[str, object]] = {
    "gpt2, dropout": {**ARCHITECTURES["gpt2"], "resid_pdrop": 0.5, "attn_pdrop": 0.5},
    "llama, attention dropout": {**ARCHITECTURES["llama"], "attention_dropout": 0.5},
}
IDS = torch.randint(0, 99, (2, 24), generator=torch.Generator().manual_seed(0))


def student(folder: Path, config: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    return student_from_config(write_config(folder / "student.json", config), 99).train()


def loss_and_gradients(model: Any, mixed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        loss = model(input_ids=IDS, labels=IDS).loss
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16 mixed"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *DROPOUT])
def test_loss_and_gradients_are_the_same(name: str, mixed: bool, tmp_path: Path) -> None:
    """Recomputation must choose the same experts and the same dropout masks again.

    Everything is bit-identical except for GPT-2's gradients, which differ by rounding.
    """
    model = student(tmp_path, {**ARCHITECTURES, **DROPOUT}[name])
    expected = loss_and_gradients(model, mixed)
    assert keep_products_only(model)
    loss, gradients = loss_and_gradients(model, mixed)
    assert loss == expected[0]
    for parameter, gradient in gradients.items():
        want = expected[1][parameter]
        rounding = 4 * torch.finfo(torch.float32).eps * float(want.abs().max()) if "gpt2" in name else 0.0
        torch.testing.assert_close(gradient, want, rtol=0.0, atol=rounding)


def kept_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that a forward pass leaves allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(input_ids=IDS, labels=IDS).loss
    torch.autograd.backward(loss)
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def test_a_layer_keeps_its_input_and_the_results_of_its_products(tmp_path: Path) -> None:
    sizes = []
    for layers in (2, 6):
        model = student(tmp_path, {**STUDENT, "num_hidden_layers": layers})
        before = kept_bytes(model)
        keep_products_only(model)
        sizes.append((before, kept_bytes(model)))
    before, after = (
        (more - less) / (4 * IDS.numel() * 4) for less, more in zip(*sizes, strict=True)
    )  # per token and layer
    # input, queries, keys and values of half as many heads, attention output, its log-sum-exps, output projection, gate
    # and up
    random = torch.get_rng_state().nbytes / (
        IDS.numel() * 4
    )  # the state of the random number generator, once per layer
    assert after - random == pytest.approx(32 + 32 + 32 + (32 + 4) + 32 + 2 * 64, rel=0.02)
    assert after < 0.6 * before


def test_no_product_is_computed_twice(tmp_path: Path) -> None:
    model, flops = student(tmp_path, STUDENT), []
    whole = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    for enable in (None, keep_products_only, whole):
        if enable is not None:
            enable(model)
        with FlopCounterMode(display=False) as counted:
            loss_and_gradients(model)
        flops.append(counted.get_total_flops())
    plain, ours, full_recompute = flops
    assert ours == plain
    assert full_recompute > plain


def test_overwritten_results_are_recomputed() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        h = (x @ w).mul_(2.0)
        return ((h * h) @ w).sin()

    expected = torch.autograd.grad(layer(x).sum(), w)
    total = checkpoint(layer, x, use_reentrant=False, context_fn=_contexts).sum()
    torch.testing.assert_close(torch.autograd.grad(total, w, retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(total, w), expected)  # a second backward pass


def test_lora(tmp_path: Path) -> None:
    model = student(tmp_path, STUDENT)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = loss_and_gradients(adapted)
    assert expected[1]
    assert keep_products_only(model)
    torch.testing.assert_close(loss_and_gradients(adapted), expected, rtol=0.0, atol=0.0)


@pytest.mark.nightly
def test_torch_compile(tmp_path: Path) -> None:
    model = student(tmp_path, STUDENT)
    expected = loss_and_gradients(model)
    keep_products_only(model)
    torch._dynamo.reset()
    loss, gradients = loss_and_gradients(torch.compile(model, backend="aot_eager"))
    actual = loss, {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_checkpointing_support_is_left_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(tmp_path, STUDENT)
    expected = loss_and_gradients(model)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert not keep_products_only(model)
    torch.testing.assert_close(loss_and_gradients(model), expected, rtol=0.0, atol=0.0)
