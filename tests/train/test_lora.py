"""Students trained by an adapter: its gradient, its folder, a resumed run, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import SoftLabels
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.models.adapters import add_lora
from logitcask.pipeline.models.generate import generate_text
from logitcask.pipeline.models.load import load_causal_lm, probe_ids
from logitcask.pipeline.models.losses import LossSettings, distillation_loss
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.train.loss import make_loss_forward
from tests.support.needed import with_bitsandbytes
from tests.support.runs import losses, metrics, train, train_settings
from tests.support.tiny import make_cache, make_teacher

LOSS = LossSettings(alpha=0.3, temperature=2.0, tail="sampled", divergence="forward-kl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("base") / "student", seed=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def options(base: Path) -> dict[str, Any]:
    return {"student_model": str(base), "lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 1e-2, "batch_size": 4,
            "max_steps": 6, "save_steps": 2, "save_total_limit": 9}  # fmt: skip


@pytest.fixture(scope="module")
def run(cache: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with checkpoints 2, 4 and 6."""
    return train(cache, tmp_path_factory.mktemp("run") / "run", **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model.eval()(input_ids=probe_ids(model)).logits
    return values


def lora(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    values: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "revision": None}
    add_lora(model, model.name_or_path, **{**values, **changes})
    return model


@pytest.mark.parametrize("recomputing", [False, True])
def test_its_gradient_is_that_of_the_dense_loss(cache: Path, base: Path, recomputing: bool) -> None:
    model = lora(load_causal_lm(str(base), dtype=torch.float64)).train()
    torch.manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert "lora_" in name
        torch.nn.init.normal_(parameter.data, std=0.1)
        parameter.data = parameter.data.double()
    source = CacheExamples(str(cache), with_targets=True)
    batch = Collator(0, tuple(source.reader.manifest.label.temperatures), 2.0, "sampled")([source[i] for i in range(5)])
    positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    dense = model(input_ids=batch["input_ids"], **positions).logits.flatten(0, 1)[batch["target_index"]]
    labels: SoftLabels[Tensor] = batch["soft_labels"]
    expected = distillation_loss(dense, batch["gold"], labels, LOSS).total
    wanted = torch.autograd.grad(expected, list(trained.values()))
    make_loss_forward(model, LOSS)
    if recomputing:
        assert keep_products_only(model)
    total = model(**batch).total
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0.0)
    torch.autograd.backward(total)
    for parameter, gradient in zip(trained.values(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def test_final_holds_the_adapter_and_its_base_as_it_was(run: Path, base: Path) -> None:
    names = {file.name for file in (run / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "settings.json", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    config = json.loads((run / "final/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 8.0)
    stored = load_file(run / "final/adapter_model.safetensors")
    assert all(bool(tensor.any()) for tensor in stored.values())
    assert len(stored) == 2 * 2 * 7
    assert metrics(run)["after"]["eval_total_loss"] < metrics(run)["before"]["eval_total_loss"]
    assert (run / "checkpoint-2/adapter_model.safetensors").stat().st_size < 100_000


def test_merged_and_not_they_give_the_same_logits(
    run: Path, cache: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = train(cache, tmp_path / "whole", **options, merge_lora=True) / "final"
    assert not list(whole.glob("adapter*"))
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "final")
    plain = AutoModelForCausalLM.from_pretrained(whole)
    expected = logits(adapted.get_base_model())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(load_causal_lm(str(run / "final"), dtype=torch.float32)), expected, rtol=1e-4, atol=1e-4
    )
    assert plain.generation_config.eos_token_id == adapted.get_base_model().generation_config.eos_token_id
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (whole, run / "final")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    train(cache, tmp_path / "further", student_model=str(whole), max_steps=1)


def test_on_a_base_in_four_bits(tmp_path: Path) -> None:
    """In a process that has bitsandbytes."""
    file = Path(__file__).with_name("four_bits.py")
    words = [sys.executable, "-m", "pytest", "-q", f"--basetemp={tmp_path / 'own'}", str(file)]
    done = subprocess.run(words, env=with_bitsandbytes(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_resumed_run_is_the_same(run: Path, cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, whose draws go on."""
    resumed = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", resumed / "checkpoint-2")
    train(cache, resumed, **options, resume_from_checkpoint="latest")
    assert losses(resumed) == losses(run)
    one, other = (load_file(place / "final/adapter_model.safetensors") for place in (resumed, run))
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_a_checkpoint_that_does_not_fit_is_refused(
    run: Path, cache: Path, base: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    resumed = tmp_path / "run"
    again = {**options, "resume_from_checkpoint": "latest"}
    shutil.copytree(run / "checkpoint-4", resumed / "checkpoint-4")
    with pytest.raises(LogitcaskError, match="lora_rank: checkpoint has 4, this run has 8"):
        train(cache, resumed, **{**again, "lora_rank": 8})
    moved = shutil.copytree(base, tmp_path / "moved")
    other = load_file(moved / "model.safetensors")
    save_file({n: t * 1.01 for n, t in other.items()}, moved / "model.safetensors", metadata={"format": "pt"})
    settings = resumed / "checkpoint-4/settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "student_model": str(moved)}))
    with pytest.raises(LogitcaskError, match="its adapter was trained on other weights than --student-model"):
        train(cache, resumed, **{**again, "student_model": str(moved)})
    shutil.rmtree(resumed / "checkpoint-4")
    shutil.copytree(run / "checkpoint-4", resumed / "checkpoint-4")
    file = resumed / "checkpoint-4/adapter_model.safetensors"
    kept = load_file(file)
    lost = kept.popitem()[0]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(LogitcaskError, match=f"adapter_model.safetensors: does not fit .* such as {lost}"):
        train(cache, resumed, **again)
    file.unlink()
    with pytest.raises(LogitcaskError, match=r"adapter_model\.safetensors: missing"):
        train(cache, resumed, **again)


def test_an_adapter_is_evaluated_and_generates(run: Path, cache: Path) -> None:
    settings = EvaluateSettings.model_validate({"model": str(run / "final"), "cache": str(cache), "device": "cpu"})
    found = evaluate(settings).on_cache
    assert found is not None
    assert found.positions == CacheReader(cache).manifest.data.positions
    pieces = generate_text(str(run / "final"), "How", max_new_tokens=4, temperature=0.0, device="cpu", seed=0)
    assert "".join(pieces)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"base_model_name_or_path": None}, "is an adapter without its base: write the model it was trained from"),
        (
            {"base_model_name_or_path": "/no/such/model"},
            "its base cannot be loaded: /no/such/model: .*write the",
        ),
        ({"r": 3}, "does not fit its base"),
        (None, "adapter_config.json: damaged"),
    ],
)
def test_an_adapter_that_cannot_be_loaded(run: Path, tmp_path: Path, change: dict[str, Any] | None, rule: str) -> None:
    folder = shutil.copytree(run / "final", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text("[" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(LogitcaskError, match=rule) as caught:
        load_causal_lm(str(folder), dtype=torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "rule"),
    [
        (
            "q_proj,nothing",
            "no layer of LlamaForCausalLM is called 'nothing': choose among down_proj, .*, or all-",
        ),
        ("lm_head", "lm_head is the model's head"),
        ("embed_tokens", "embed_tokens is the model's embedding"),
        ("mlp", "no adapter for LlamaForCausalLM: ValueError: Target module LlamaMLP"),
        ("", "is called ''"),
    ],
)
def test_wrong_targets(base: Path, targets: str, rule: str) -> None:
    with pytest.raises(LogitcaskError, match=rule) as caught:
        lora(load_causal_lm(str(base), dtype=torch.float32), targets=targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"student_config": "tiny", "lora_rank": 4}, "--lora-rank needs --student-model"),
        ({"student_model": "m.gguf", "lora_rank": 4}, "needs --merge-lora"),
        ({"student_model": "m", "lora_alpha": 4, "merge_lora": True}, "--lora-alpha, --merge-lora needs --lora-rank"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        train_settings("c", tmp_path / "run", **changes)
