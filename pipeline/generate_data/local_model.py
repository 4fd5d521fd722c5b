"""Answers of a model on this machine, through transformers: sequence-level distillation.

Legend: B prompts per batch, P their padded length, G generated tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import say
from logitcask.pipeline.generate_data.client import Reply
from logitcask.pipeline.generate_data.prompts import Prompt
from logitcask.pipeline.machine import choose_device, why_slow
from logitcask.pipeline.models.load import load_causal_lm, max_positions, sampling
from logitcask.pipeline.text.tokenizer import as_chat, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def answer_locally(
    source: str,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float | None,
    dtype: str,
    device: str,
    seed: int,
) -> Iterator[list[tuple[Prompt, Reply]]]:
    """Yield the replies to the prompts, batch by batch; ``temperature`` None keeps the model's own sampling settings.

    Raises LogitcaskError if the model or device is not available or a prompt does not fit the model's context.
    """
    tokenizer, place = load_tokenizer(source), choose_device(device)
    tokenizer.padding_side = "left"
    kind = DTYPES[dtype] if dtype != "auto" else (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if slow := why_slow(kind, place):
        say(slow)
    texts = [as_chat(tokenizer, prompt.text) for prompt in prompts]
    model = load_causal_lm(source, dtype=kind).to(place).eval()
    if not (ends := _ends(model, tokenizer)):
        raise LogitcaskError(f"--model {source}: has no end token, so none of its replies would end: use another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(ends))
    _require_room(model, tokenizer, texts, max_new_tokens)
    set_seed(seed)
    for start in range(0, len(prompts), batch_size):
        replies = _generate(model, tokenizer, texts[start : start + batch_size], max_new_tokens, temperature, ends)
        yield list(zip(prompts[start : start + batch_size], replies, strict=True))


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a reply."""
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    return tokenizer(texts, add_special_tokens=not tokenizer.chat_template, **options)


def _require_room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_new_tokens: int
) -> None:
    room = max_positions(model)
    longest = max(len(ids) for ids in _encode(tokenizer, texts).input_ids)
    if room is not None and longest + max_new_tokens > room:
        raise LogitcaskError(
            f"--max-new-tokens {max_new_tokens}: with the longest prompt's {longest} tokens that is more than the "
            f"model's {room} positions: at most {max(0, room - longest)}"
        )


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_new_tokens: int,
    temperature: float | None,
    ends: set[int],
) -> list[Reply]:
    inputs_BP = _encode(tokenizer, texts, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs_BP["input_ids"],
            attention_mask=inputs_BP["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            **({} if temperature is None else sampling(temperature)),
        )
    ids_BG = ids[:, inputs_BP["input_ids"].shape[1] :].tolist()
    lengths = inputs_BP["attention_mask"].sum(1).tolist()
    return [_reply(tokenizer, row, ends, length) for row, length in zip(ids_BG, lengths, strict=True)]


def _reply(tokenizer: PreTrainedTokenizerBase, row: list[int], ends: set[int], prompt_tokens: int) -> Reply:
    end = next((index for index, token in enumerate(row) if token in ends), None)
    text = tokenizer.decode(row[:end], skip_special_tokens=True)
    used = len(row) if end is None else end + 1
    return Reply(str(text), "length" if end is None else "stop", prompt_tokens, used)
