"""Text from a student, with the chat template where its tokenizer has one."""

from collections.abc import Iterator
from threading import Thread

import torch
from transformers import TextIteratorStreamer, set_seed

from pipeline.devices import choose_device
from pipeline.models import load_causal_lm
from pipeline.settings import GenerateSettings
from pipeline.tokenizer import load_tokenizer


def generate_text(settings: GenerateSettings) -> Iterator[str]:
    """Pieces of the answer as they are made. Raises LogitcaskError where the model cannot be loaded."""
    tokenizer = load_tokenizer(settings.model)
    model = load_causal_lm(settings.model, dtype=torch.float32).to(choose_device(settings.device)).eval()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": settings.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(settings.prompt, return_tensors="pt")
    set_seed(settings.seed)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    request = {**inputs.to(model.device), **sampling, "max_new_tokens": settings.max_new_tokens, "streamer": streamer}

    def work() -> None:
        with torch.inference_mode():
            model.generate(**request, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
