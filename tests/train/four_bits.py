"""A student on a base in 4 bits, where bitsandbytes can be imported: run by tests/train/test_lora.py."""

import json
import shutil
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import logitcask as lc
from logitcask.pipeline.models.adapters import four_bits
from tests.support.distilled import gradients
from tests.support.runs import losses, metrics, train
from tests.support.tiny import make_cache, make_teacher
from tests.train.test_lora import logits


def test_on_a_base_in_four_bits(tmp_path: Path) -> None:
    """The adapter is trained on the rounded base, saved, resumed, and merged with the base as it is stored."""
    base = make_teacher(tmp_path / "base", seed=1, width=128)  # a block of 4 bits has 64 weights
    cache = make_cache(tmp_path)
    options = {"student_model": str(base), "load_in_4bit": True, "lora_rank": 4, "lora_dropout": 0.1, "max_steps": 8,
               "batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "eval_fraction": 0.2}  # fmt: skip
    run = train(cache, tmp_path / "run", **options)
    assert metrics(run)["after"]["eval_total_loss"] < metrics(run)["before"]["eval_total_loss"]
    assert losses(run)[0] != losses(train(cache, tmp_path / "float", **options | {"load_in_4bit": False}))[0]
    stored = load_file(run / "final/adapter_model.safetensors")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-8")
    train(cache, run, **options, resume_from_checkpoint="latest")
    torch.testing.assert_close(load_file(run / "final/adapter_model.safetensors"), stored, rtol=0.0, atol=0.0)
    whole = train(cache, tmp_path / "whole", **options, merge_lora=True) / "final"
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())
    plain = logits(AutoModelForCausalLM.from_pretrained(whole))
    unmerged = logits(AutoPeftModelForCausalLM.from_pretrained(run / "final").get_base_model())
    torch.testing.assert_close(plain, unmerged, rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_it_after_an_evaluation(tmp_path: Path) -> None:
    """On a CPU with AVX-512 BF16, bitsandbytes packs evaluated layers anew, and they have no gradient."""
    opened = lc.open(make_cache(tmp_path))
    base = make_teacher(tmp_path / "base", seed=1, width=128)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits())
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = opened.collator()([opened.dataset()[i] for i in range(8)])
    logits_before = adapted.train()(input_ids=batch["input_ids"]).logits  # before any evaluation, as kd_loss does one
    torch.autograd.backward(lc.kd_loss_from_logits(logits_before, batch))
    plain = gradients(adapted)
    for _ in range(2):
        adapted.zero_grad()
        torch.autograd.backward(lc.kd_loss(adapted.train(), batch))
        for name, gradient in gradients(adapted).items():
            assert (gradient - plain[name]).norm() < 0.02 * plain[name].norm(), name
        with torch.no_grad():
            adapted.eval()(input_ids=batch["input_ids"])
