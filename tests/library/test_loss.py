"""kd_loss and kd_loss_from_logits: values and gradients against the dense float64 reference; bad use, in one line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import logitcask as lc
from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import Batch
from tests.library.example_loss import skewed_kl
from tests.support.distilled import assert_close, dense_gradients, dense_losses, gradients, make_student, mixed_lengths
from tests.support.runs import STUDENT, train, train_settings, write_config
from tests.support.servers import free_port
from tests.support.tiny import make_cache

ALPHA = 0.3
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
BATCHES = [(1.0, "sampled"), (2.0, "sampled"), (2.0, "bucket")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_lengths(tmp_path_factory.mktemp("loss"))


def batch_at(cache: Path, temperature: float = 1.0, tail: str | None = None, **options: Any) -> Batch:
    opened = lc.open(cache)
    dataset = opened.dataset()
    batch: Batch = opened.collator(temperature=temperature, tail=tail, **options)([dataset[i] for i in range(24)])
    return batch


@pytest.fixture
def batch(cache: Path) -> Batch:
    return batch_at(cache)


def with_lora(model: Any, config: LoraConfig = LORA) -> Any:
    torch.manual_seed(2)
    adapted: Any = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)  # or the gradient of the other half is 0
    return adapted


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrap", [None, with_lora])
def test_plain_loop_has_the_gradients_of_the_dense_loss(
    cache: Path, temperature: float, packed: bool, wrap: Callable[[Any], Any] | None
) -> None:
    model, batch = make_student(), batch_at(cache, temperature, packed=packed)
    assert ("position_ids" in batch) == packed
    model = wrap(model) if wrap else model
    expected, wanted = dense_gradients(model, [batch], ALPHA)
    forward = model.forward
    loss = lc.kd_loss(model, batch, alpha=ALPHA)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert_close(gradients(model), wanted)
    assert model.forward == forward  # nothing is left behind
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == 300
    model.zero_grad()
    positions = {"position_ids": batch["position_ids"]} if packed else {}
    logits = model(input_ids=batch["input_ids"], use_cache=False, **positions).logits
    torch.autograd.backward(lc.kd_loss_from_logits(logits, batch, alpha=ALPHA))
    assert_close(gradients(model), wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixed_batch_has_the_gradients_of_the_dense_loss(cache: Path, tmp_path: Path, packed: bool) -> None:
    make_cache(tmp_path, head_size=2, tail_draws=4, temperatures="1,2")
    mixed = lc.mix([lc.open(cache), lc.open(tmp_path / "cache")], [0.6, 0.4])
    model, batch = make_student(), next(iter(lc.loader(mixed, 24, 2.0, packed=packed)))
    assert ("position_ids" in batch) == packed
    assert batch["soft_labels"].head_size == 2
    expected, wanted = dense_gradients(model, [batch], ALPHA)
    loss = lc.kd_loss(model, batch, alpha=ALPHA)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert_close(gradients(model), wanted)


@pytest.mark.parametrize("tail", ["sampled", "bucket", "renormalize"])
def test_losses_per_position_may_be_weighted(cache: Path, tail: str) -> None:
    model, batch = make_student(), batch_at(cache, 2.0, tail)
    weights = torch.linspace(0, 1, len(batch["gold"]))
    losses = lc.kd_loss(model, batch, alpha=ALPHA, per_position=True)
    torch.autograd.backward((losses * weights).sum())
    fused = gradients(model)
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"]).logits
    plain = lc.kd_loss_from_logits(logits, batch, alpha=ALPHA, per_position=True)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-5)
    torch.autograd.backward((plain * weights).sum())
    assert_close(fused, gradients(model))
    torch.testing.assert_close(losses.mean(), lc.kd_loss(model, batch, alpha=ALPHA), rtol=1e-5, atol=1e-6)
    if tail != "bucket":
        torch.testing.assert_close(plain.double(), dense_losses(logits, batch, ALPHA), rtol=1e-4, atol=1e-5)


def test_a_normalizer_makes_accumulation_exact(cache: Path) -> None:
    model, opened = make_student(), lc.open(cache)
    dataset, collate = opened.dataset(), opened.collator()
    batches = [collate([dataset[i] for i in rows]) for rows in ([0, 1, 2, 3], [4, 5])]
    _, wanted = dense_gradients(model, batches, ALPHA)
    count = sum(len(batch["gold"]) for batch in batches)
    for batch in batches:
        torch.autograd.backward(lc.kd_loss(model, batch, alpha=ALPHA, normalizer=count))
    assert_close(gradients(model), wanted)


def test_a_trained_copy_of_the_head(batch: Batch) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = with_lora(make_student(), config)
    _, wanted = dense_gradients(model, [batch], ALPHA)
    torch.autograd.backward(lc.kd_loss(model, batch, alpha=ALPHA))
    assert any("lm_head" in name for name in wanted)
    assert_close(gradients(model), wanted)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrapped_by_ddp(batch: Batch) -> None:
    model = with_lora(make_student())
    _, wanted = dense_gradients(model, [batch], ALPHA)
    wrapped, calls = DistributedDataParallel(model), []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    torch.autograd.backward(lc.kd_loss(wrapped, batch, alpha=ALPHA))
    assert calls == [1]  # gradients are averaged only of what went through the wrapper
    assert_close(gradients(model), wanted)


def test_a_loss_of_ones_own(cache: Path) -> None:
    model, batch = make_student(), batch_at(cache, 2.0)
    labels = batch["soft_labels"]
    logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["target_index"]]
    hard = nn.functional.cross_entropy(logits, batch["gold"], reduction="none")
    torch.autograd.backward((ALPHA * hard + (1 - ALPHA) * skewed_kl(logits, labels)).mean())
    wanted = gradients(model)
    for losses in (lc.kd_loss(model, batch, ALPHA, loss=skewed_kl),
                   lc.kd_loss(model, batch, ALPHA, loss=skewed_kl, per_position=True).mean()):  # fmt: skip
        model.zero_grad()
        torch.autograd.backward(losses)
        assert_close(gradients(model), wanted)


def test_train_takes_it_by_name_and_resumes_with_the_same_only(cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss": "tests.library.example_loss:skewed_kl", "save_steps": 2}
    options["student_config"] = student = write_config(tmp_path / "student.json", STUDENT)
    whole = train(cache, tmp_path / "whole", max_steps=4, **options)
    assert json.loads((whole / "final/settings.json").read_text())["loss"] == options["loss"]
    other = train(cache, tmp_path / "other", max_steps=4)
    lines = [json.loads((run / "metrics.json").read_text())["after"]["eval_soft_loss"] for run in (whole, other)]
    assert lines[0] != lines[1]
    latest = str(whole / "checkpoint-2")
    with pytest.raises(LogitcaskError, match="another run: loss: checkpoint has"):
        train(cache, tmp_path / "again", max_steps=4, resume_from_checkpoint=latest, student_config=student)
    train(cache, tmp_path / "again", max_steps=4, resume_from_checkpoint=latest, **options)
    same = [(run / "final/model.safetensors").read_bytes() for run in (whole, tmp_path / "again")]
    assert same[0] == same[1]


MODULE = """
import torch
def scalar(logits, labels): return logits.sum()
def detached(logits, labels): return logits.detach().sum(1)
def number(logits, labels): return 1.0
def broken(logits, labels): return logits.gather(1, labels.idz)
constant = 3
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mine", "--loss must be module:function, got 'mine'"),
        ("nowhere:f", "--loss nowhere:f: cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
        ("own_losses:g", "own_losses.py has no function g"),
        ("own_losses:constant", "own_losses.py has no function constant"),
        ("own_losses:scalar", r"must return one loss per position, a tensor of shape \(\d+,\), got \(\)"),
        ("own_losses:number", "got float"),
        ("own_losses:detached", "does not depend on the logits"),
        ("own_losses:broken", r"AttributeError: .*idz.* \(.*own_losses.py:6\)"),
    ],
)
def test_bad_losses(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str) -> None:
    (tmp_path / "own_losses.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LogitcaskError, match=line) as caught:
        train(cache, tmp_path / "run", loss=name, max_steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distillation_type": "output"}, "--loss takes the place of the divergence"),
        ({"tail": "bucket", "divergence": "jsd"}, "--loss takes the place of the divergence"),
    ],
)
def test_options_that_a_loss_replaces(cache: Path, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        train_settings(cache, tmp_path / "run", loss="a:b", **changes)


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "soft_labels"}


BAD: list[tuple[Callable[[Batch], Batch], dict[str, Any], str]] = [
    (without_labels, {}, "alpha 0.1 needs soft labels, but the batch has none"),
    (lambda b: {**b, "soft_labels": b["soft_labels"][:3]}, {}, "the batch has labels for 3 positions and"),
    (lambda b: {**b, "input_ids": b["input_ids"].roll(1, 1)}, {}, "the batch's labels are for other positions"),
    (lambda b: b, {"temperature": 2.0}, "temperature is 2, but the batch's labels are at 1"),
    (lambda b: b, {"divergence": "jsd"}, "divergence jsd requires labels of tail='bucket', got 'sampled'"),
    (lambda b: b, {"divergence": "kl"}, "divergence must be one of forward-kl, reverse-kl, jsd, tvd, got 'kl'"),
    (lambda b: b, {"alpha": 1.5}, "alpha must be a number between 0 and 1, .* got 1.5"),
    (lambda b: b, {"alpha": "0.5"}, "alpha must be a number between 0 and 1, .* got '0.5'"),
    (
        lambda b: b,
        {"alpha": [1, 0]},
        r"alpha must be .* or \(first, last\) of two such, got \[1, 0",
    ),
    (lambda b: {name: value for name, value in b.items() if name != "gold"}, {}, "the batch has no gold: take it from"),
    (lambda b: {"input_ids": b["input_ids"]}, {}, "the batch has no target_index: take it from the collator or"),
    (lambda b: b, {"divergence": "jsd", "loss": skewed_kl}, "give one of the two"),
]


@pytest.mark.parametrize(("change", "options", "line"), BAD)
def test_bad_batches_and_settings(
    batch: Batch, change: Callable[[Batch], Batch], options: dict[str, Any], line: str
) -> None:
    model, changed = make_student(), change(batch)
    calls: list[Callable[[], Tensor]] = [
        lambda: lc.kd_loss(model, changed, **options),
        lambda: lc.kd_loss_from_logits(model(input_ids=batch["input_ids"]).logits, changed, **options),
    ]
    for call in calls:
        with pytest.raises(LogitcaskError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


def prefixed(model: Any) -> Any:
    config: Any = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: make_student(200), "the model's vocabulary has 200 tokens and the labels need 3"),
        (lambda: prefixed(make_student()), "PrefixTuningConfig: not supported: it adds tokens to the input"),
        (lambda: with_lora(make_student(), replace(LORA, target_modules=["lm_head"])), "its head has an adapter"),
        (lambda: nn.Linear(3, 3), "must be a causal language model of transformers, got Linear"),
    ],
)
def test_bad_models(batch: Batch, make: Callable[[], Any], line: str) -> None:
    with pytest.raises(LogitcaskError, match=line) as caught:
        lc.kd_loss(make(), batch)
    assert "\n" not in str(caught.value)


def test_logits_of_another_shape_or_vocabulary(batch: Batch) -> None:
    logits = make_student()(input_ids=batch["input_ids"]).logits
    with pytest.raises(LogitcaskError, match=r"logits must have the shape"):
        lc.kd_loss_from_logits(logits[:, :-1], batch)
    with pytest.raises(LogitcaskError, match="the model's vocabulary has 100 tokens"):
        lc.kd_loss_from_logits(logits[..., :100], batch)
    rows = logits.flatten(0, 1)[batch["target_index"]]
    torch.testing.assert_close(lc.kd_loss_from_logits(rows, batch), lc.kd_loss_from_logits(logits, batch))


def test_mixed_precision_of_accelerate(batch: Batch) -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        accelerator, model = Accelerator(mixed_precision="bf16", cpu=True), make_student()
        expected = float(lc.kd_loss(model, batch))
        prepared = accelerator.prepare(model)
        with pytest.raises(LogitcaskError, match=r"call kd_loss inside accelerator.autocast\(\)"):
            lc.kd_loss(prepared, batch)
        with accelerator.autocast():
            assert float(lc.kd_loss(prepared, batch)) == pytest.approx(expected, rel=1e-2)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_gradients_flow_to_float64_models(batch: Batch) -> None:
    model: Any = make_student().double()
    loss: Tensor = lc.kd_loss(model, batch, alpha=ALPHA)
    assert loss.dtype == torch.float64
    expected, _ = dense_gradients(model, [batch], ALPHA)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
