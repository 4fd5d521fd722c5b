"""Text generation with a student, through the chat template if its tokenizer has one."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, set_seed

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device, explain_out_of_memory, out_of_memory
from logitcask.pipeline.models.load import load_causal_lm, max_positions, sampling
from logitcask.pipeline.text.tokenizer import as_chat, load_tokenizer, student_of

ANSWER_TOKENS = 120


def generate_text(
    model: str, prompt: str, *, max_new_tokens: int, temperature: float, device: str, seed: int
) -> Iterator[str]:
    """Yield the answer piece by piece as it is generated; the folder of a run stands for its student.

    Raises LogitcaskError if the model cannot be loaded, the prompt is empty or too long, or generation fails.
    """
    with explain_out_of_memory(
        f"use a shorter --prompt, lower --max-new-tokens from {max_new_tokens}, or use a smaller model"
    ):
        if (student := student_of(model)) is not None:
            say(str(student), "model")
            model = str(student)
        tokenizer = load_tokenizer(model)
        loaded = load_causal_lm(model, dtype=torch.float32).to(choose_device(device)).eval()
        set_seed(seed)
        yield from _reply(loaded, tokenizer, prompt, max_new_tokens, temperature)


def _reply(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, temperature: float
) -> Iterator[str]:
    text = as_chat(tokenizer, prompt)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    used, limit = inputs["input_ids"].shape[1], max_positions(model)
    if used == 0:
        raise LogitcaskError("--prompt: must hold at least one token, got none: give the beginning of a text")
    if limit is not None and used >= limit:
        raise LogitcaskError(
            f"--prompt: must leave room in the model's {limit} positions, got {used} tokens: shorten it"
        )
    longest = max_new_tokens if limit is None else min(max_new_tokens, limit - used)
    yield from stream(model, tokenizer, inputs, longest, temperature)


def answer_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Return a loaded model's answer, greedily. Raises as ``generate_text`` does."""
    return "".join(_reply(model.eval(), tokenizer, prompt, max_new_tokens, 0.0)).strip()


def answer(model: Path, prompt: str) -> str:
    """Return a model's answer, greedily, of at most ``ANSWER_TOKENS`` tokens. Raises as ``generate_text`` does."""
    pieces = generate_text(str(model), prompt, max_new_tokens=ANSWER_TOKENS, temperature=0.0, device="auto", seed=0)
    return "".join(pieces).strip()


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[str]:
    """Yield text in words or lines while the model generates in a thread. Raises LogitcaskError if it fails."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    request = {**inputs.to(model.device), **sampling(temperature), "max_new_tokens": max_new_tokens}
    errors: list[Exception] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **request, streamer=streamer, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id
                )
        except Exception as error:  # re-raised below: an exception in a thread would be lost
            errors.append(error)
            streamer.end()  # otherwise the reader waits forever

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if errors and out_of_memory(errors[0]):
        raise errors[0]
    if errors:
        raise LogitcaskError(
            f"the model failed while generating: {type(errors[0]).__name__}: {errors[0]}; "
            "try another --prompt or --temperature 0, or check the model with logitcask evaluate"
        ) from errors[0]
