"""kd_loss of models as they come: under autocast, adapters on and off, copied, compiled, on a rank without data."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel

import logitcask as lc
from logitcask.pipeline.batches.collate import Batch
from logitcask.pipeline.train.loss import make_loss_forward
from tests.library.test_loss import ALPHA, batch_at, with_lora
from tests.support.distilled import assert_close, dense_gradients, gradients, make_student, mixed_lengths
from tests.support.servers import free_port


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_lengths(tmp_path_factory.mktemp("any"))


@pytest.fixture
def batch(cache: Path) -> Batch:
    return batch_at(cache)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield Accelerator(mixed_precision="bf16", cpu=True)
    for state in states:
        state._reset_state()


@pytest.mark.parametrize("precision", ["autocast", "accelerator"])
def test_the_first_call_in_mixed_precision(cache: Path, batch: Batch, precision: str, accelerator: Accelerator) -> None:
    """What a model does is found out in the first call, here in bfloat16; packed, too."""
    wanted = float(lc.kd_loss(make_student(), batch).detach())
    student: Any = make_student()
    around = torch.autocast("cpu", dtype=torch.bfloat16)
    if precision == "accelerator":
        student, around = accelerator.prepare(student), accelerator.autocast()
    with around:
        losses = [lc.kd_loss(student, each) for each in (batch, batch_at(cache, packed=True))]
    assert [float(loss.detach()) for loss in losses] == pytest.approx([wanted, wanted], rel=0.02)
    torch.autograd.backward(losses[0])


def test_with_adapters_off_the_head_is_the_original(batch: Batch) -> None:
    """Another adapter of the same model may have no copy of the head, too."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    wanted = lc.kd_loss(make_student(), batch)
    model = with_lora(make_student(), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert abs(float((lc.kd_loss(model, batch) - wanted).detach())) > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(lc.kd_loss(model, batch), wanted)
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("plain")
    torch.testing.assert_close(lc.kd_loss(model, batch), wanted)


def test_an_adapter_of_some_tokens(batch: Batch) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM")
    model = with_lora(make_student(), config)
    _, wanted = dense_gradients(model, [batch], ALPHA)
    assert any("token" in name for name in wanted)
    torch.autograd.backward(lc.kd_loss(model, batch, alpha=ALPHA))
    assert_close(gradients(model), wanted)


def test_a_deep_copy_computes_its_own_logits(batch: Batch) -> None:
    """As the average of the weights in EMA does, made of a model whose forward is the loss."""
    model = make_student()
    make_loss_forward(model, lc.Distillation(alpha=ALPHA))
    copy, before = deepcopy(model), float(model(**batch).total.detach())
    with torch.no_grad():
        copy.lm_head.weight.mul_(2.0)
        copy.model.layers[0].self_attn.q_proj.weight.zero_()
    wanted, _ = dense_gradients(copy, [batch], ALPHA)
    assert float(copy(**batch).total.detach()) / len(batch["gold"]) == pytest.approx(wanted, rel=1e-5)
    assert float(model(**batch).total.detach()) == before
    logits = [one(input_ids=batch["input_ids"]).logits for one in (model, copy)]
    assert not torch.allclose(*logits)


@pytest.mark.usefixtures("process_group")
def test_no_examples_on_a_rank_give_zero_gradients_to_every_weight(cache: Path) -> None:
    """Otherwise DistributedDataParallel waits for those of the head for ever."""
    opened = lc.open(cache)
    empty = opened.collator()([])
    for per_position in (False, True):
        model = make_student()
        loss = lc.kd_loss(DistributedDataParallel(model), empty, alpha=ALPHA, per_position=per_position)
        torch.autograd.backward(loss.sum())
        assert loss.shape == ((0,) if per_position else ())
        given = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(grad is not None and not grad.any() for grad in given.values())


def test_compiled_it_is_not_compiled_again_per_number_of_positions(cache: Path) -> None:
    opened, compiled = lc.open(cache), list[Any]()
    dataset, collate = opened.dataset(), opened.collator()
    model = make_student()

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    student: Any = torch.compile(model, backend=backend)
    counts = []
    for cut in range(6):
        batch = collate([dataset[i] for i in (3, 4)])
        kept = slice(0, len(batch["gold"]) - cut)
        labels = batch["soft_labels"][kept]
        batch |= {"target_index": batch["target_index"][kept], "gold": batch["gold"][kept], "soft_labels": labels}
        loss = lc.kd_loss(student, batch, alpha=ALPHA)
        torch.testing.assert_close(loss, lc.kd_loss(model, batch, alpha=ALPHA), rtol=1e-4, atol=1e-5)
        counts.append(len(compiled))
    assert counts[-1] == counts[2] > 0
