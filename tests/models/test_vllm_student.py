"""A trained student in vLLM generates the same greedy tokens as in transformers. Run by ``just test-vllm``."""

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has its own environment: just setup-vllm && just test-vllm")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.runs import STUDENT, train, write_config
from tests.support.tiny import make_cache

TEXTS = ["How many apples", "There are 5 grapes and honey", "x", "How many eggs are 2+2?\n"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that training leaves, unchanged; heads are as wide as vLLM's CPU attention requires."""
    folder = tmp_path_factory.mktemp("student")
    student = write_config(folder / "student.json", {**STUDENT, "hidden_size": 128, "intermediate_size": 256})
    options = {"distillation_type": "output", "max_steps": 100, "learning_rate": 1e-2, "logging_steps": 100}
    return train(make_cache(folder), folder / "run", student_config=student, **options) / "final"


def test_vllm_writes_what_transformers_writes(final: Path) -> None:
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    prompts = [tokenizer.encode(text) for text in TEXTS]
    want, log_p = [], []
    with torch.inference_mode():
        for ids in prompts:
            whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
            rows = torch.arange(len(ids) - 1, whole.shape[1] - 1)
            want.append(whole[0, len(ids) :].tolist())
            log_p.append(model(whole).logits[0].log_softmax(1)[rows, whole[0, len(ids) :]].tolist())
    engine = LLM(str(final), dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=2**28)
    options = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == want
    for output, ids, likely in zip(outputs, want, log_p, strict=True):
        own = [logprobs[token].logprob for logprobs, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        assert own == pytest.approx(likely, abs=1e-3)
    assert any(len(set(ids)) > 3 for ids in want), "a student that repeats one token proves little"
    by_text = engine.generate(TEXTS, options, use_tqdm=False)  # with the tokenizer saved in the folder
    assert [list(output.outputs[0].token_ids) for output in by_text] == want
