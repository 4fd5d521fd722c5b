"""Text from a student, with the chat template where its tokenizer has one."""

from collections.abc import Iterator
from threading import Thread

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, set_seed

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.machine import choose_device, explain_out_of_memory, out_of_memory
from logitcask.pipeline.models.load import load_causal_lm, max_positions, sampling
from logitcask.pipeline.text.tokenizer import as_chat, load_tokenizer


def generate_text(
    model: str, prompt: str, *, max_new_tokens: int, temperature: float, device: str, seed: int
) -> Iterator[str]:
    """Pieces of the answer as they are made.

    Raises LogitcaskError if the model cannot be loaded, has no room for the prompt, or fails while it writes.
    """
    with explain_out_of_memory(
        f"take a shorter --prompt, a lower --max-new-tokens than {max_new_tokens}, or a smaller model"
    ):
        tokenizer = load_tokenizer(model)
        loaded = load_causal_lm(model, dtype=torch.float32).to(choose_device(device)).eval()
        text = as_chat(tokenizer, prompt)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        used, limit = inputs["input_ids"].shape[1], max_positions(loaded)
        if used == 0:
            raise LogitcaskError("--prompt: must hold at least one token, is empty: give the beginning of a text")
        if limit is not None and used >= limit:
            raise LogitcaskError(
                f"--prompt: must leave room in the model's {limit} positions, has {used} tokens: cut it"
            )
        longest = max_new_tokens if limit is None else min(max_new_tokens, limit - used)
        set_seed(seed)
        yield from stream(loaded, tokenizer, inputs, longest, temperature)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[str]:
    """Pieces of text, words or lines, as the model makes them in a thread. Raises LogitcaskError where it fails."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    request = {**inputs.to(model.device), **sampling(temperature), "max_new_tokens": max_new_tokens}
    failed: list[Exception] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **request, streamer=streamer, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id
                )
        except Exception as error:  # raised again below: an exception in a thread is seen by nobody
            failed.append(error)
            streamer.end()  # else the reader waits for ever

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed and out_of_memory(failed[0]):
        raise failed[0]
    if failed:
        raise LogitcaskError(
            f"the model failed while it wrote: {type(failed[0]).__name__}: {failed[0]}; "
            "try another --prompt or --temperature 0, or check it with logitcask evaluate"
        ) from failed[0]
