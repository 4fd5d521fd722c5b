"""logitcask generate: it streams, with and without a chat template, and never hangs."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.cli import main
from logitcask.pipeline.models.generate import generate_text, stream
from tests.support.mistakes import said
from tests.support.tiny import make_teacher

PROMPT = "How many apples"


def pieces(model: Path, **changes: Any) -> Iterator[str]:
    options = {"max_new_tokens": 128, "temperature": 0.0, "device": "cpu", "seed": 0, **changes}
    return generate_text(str(model), PROMPT, **options)


@pytest.mark.parametrize("chat", [False, True])
def test_the_text_is_the_models_own(chat: bool, tmp_path: Path) -> None:
    """Compare with greedy decoding by plain forward passes over the text, in the chat template if there is one."""
    folder = make_teacher(tmp_path / "model", chat=chat)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n" if chat else PROMPT
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    begin = len(ids)
    with torch.inference_mode():
        while len(ids) < begin + 24 and (len(ids) == begin or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    want = tokenizer.decode(ids[begin:], skip_special_tokens=True)
    assert "".join(pieces(folder, max_new_tokens=24)) == want


def test_the_first_piece_arrives_before_the_last_is_generated(tmp_path: Path) -> None:
    """The model waits at its fortieth token until the first piece has been read."""
    folder = make_teacher(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    seen, calls, in_time = threading.Event(), list[int](), list[bool]()

    def wait(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 40:
            in_time.append(seen.wait(10))

    model.register_forward_hook(wait)
    torch.manual_seed(0)
    pieces = stream(model, tokenizer, tokenizer(PROMPT, return_tensors="pt"), 60, 1.0)
    first = next(piece for piece in pieces if piece)
    seen.set()
    rest = list(pieces)
    assert in_time == [True]
    assert len(calls) == 60
    assert first
    assert "".join(rest)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a non-finite weight, so that sampling from its logits fails."""
    folder = make_teacher(tmp_path_factory.mktemp("broken") / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(folder)
    return folder


def test_a_model_that_fails_while_generating_is_an_error(broken: Path) -> None:
    """Read in a separate thread, so that a reader that waits forever fails this test instead of blocking it."""
    messages = list[str]()

    def read() -> None:
        try:
            list(pieces(broken, temperature=1.0))
        except LogitcaskError as error:
            messages.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(30)
    assert not reader.is_alive(), "the reader waits for a generator that has failed"
    assert len(messages) == 1
    assert "the model failed while generating: RuntimeError: probability tensor" in messages[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "error: the model failed while generating: RuntimeError"),
        ({"prompt": ""}, "error: --prompt: must hold at least one token, got none"),
        ({"prompt": "xyz " * 50}, "error: --prompt: must leave room in the model's 128 positions, got 2"),
    ],
)
def test_a_failure_is_one_line(
    changes: dict[str, object],
    message: str,
    broken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"model": broken, "prompt": PROMPT, "device": "cpu", **changes}
    words = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["logitcask", "generate", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert message in said(err)


def test_generation_stops_at_the_models_last_position(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "model", max_length=16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(pieces(folder, max_new_tokens=500))
    assert 0 < len(tokenizer.encode(text)) <= 2 * (16 - len(tokenizer.encode(PROMPT)))
