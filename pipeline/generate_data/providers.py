"""Models behind an API, by their makers' own packages, which send a request again as the server's headers say.

Both packages retry 408, 409, 429, 5xx, timeouts and broken connections, after ``retry-after`` where the server sends
it (openai: up to two minutes, longer ones are not waited for; anthropic: any) or else after 0.5 to 8 s. Keys come from
the environment, go to their own server only, and are cut out of every message.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.generate_data.client import Ask, NoReplyError, Reply

# package, environment variable of the key
PROVIDERS = {
    "openai": ("openai", "OPENAI_API_KEY"),
    "openai-compatible": ("openai", "OPENAI_COMPATIBLE_API_KEY"),
    "anthropic": ("anthropic", "ANTHROPIC_API_KEY"),
}
HOPELESS_STATUS = {401, 402, 403, 404}  # the key, the account, the model: no prompt changes them
LONGEST_WAIT = 120.0  # seconds between two attempts, at most
OPENAI_FINISH = {"stop": "stop", "length": "length", "content_filter": "refusal"}
ANTHROPIC_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refusal",
}


@contextlib.asynccontextmanager
async def open_api(
    provider: str,
    model: str,
    *,
    base_url: str | None,
    max_new_tokens: int,
    temperature: float | None,
    timeout: float,
    max_retries: int,
) -> AsyncIterator[Ask]:
    """What asks the model one prompt; ``timeout`` in seconds is that of one attempt.

    Raises LogitcaskError where the key is missing. What it gives raises NoReplyError.
    """
    name, variable = PROVIDERS[provider]
    sdk, key = import_module(name), _key(provider, variable)
    common: dict[str, Any] = {"api_key": key, "timeout": timeout, "max_retries": max_retries}
    if provider == "openai-compatible":
        common["base_url"] = base_url
    client = sdk.AsyncAnthropic(**common) if provider == "anthropic" else sdk.AsyncOpenAI(**common)
    if provider == "openai-compatible":
        client.organization = client.project = None  # what OPENAI_* says is meant for OpenAI alone
    request: dict[str, Any] = {"model": model} | ({} if temperature is None else {"temperature": temperature})
    request["max_completion_tokens" if provider == "openai" else "max_tokens"] = max_new_tokens
    send: Callable[..., Awaitable[object]] = (
        client.messages.create if provider == "anthropic" else client.chat.completions.create
    )
    read = _read_message if provider == "anthropic" else _read_completion
    patience = (timeout + LONGEST_WAIT) * (max_retries + 1)

    async def ask(prompt: str) -> Reply:
        try:
            async with asyncio.timeout(patience):
                found = await send(messages=[{"role": "user", "content": prompt}], **request)
            return read(found)
        except Exception as error:
            raise _no_reply(error, sdk, key) from error

    async with client:
        yield ask


def _key(provider: str, variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if key or provider == "openai-compatible":
        return key or "none"  # a server of one's own seldom wants a key, the package always does
    raise LogitcaskError(f"--provider {provider} needs a key: set the environment variable {variable}")


def _no_reply(error: Exception, sdk: ModuleType, key: str) -> NoReplyError:
    """The error as one line without the key. Raises the error itself where it is none of the server's."""
    status = error.status_code if isinstance(error, sdk.APIStatusError) else None
    if status is not None:
        words, free = str(error), True
    elif isinstance(error, sdk.APITimeoutError | TimeoutError):
        words, free = "no reply in time", False
    elif isinstance(error, sdk.APIConnectionError):
        words, free = f"no connection ({error.__cause__ or error})", False
    elif isinstance(error, sdk.APIError | ValueError):  # JSON that is none, or of another shape
        words, free = f"malformed reply: {error}", False
    else:
        raise error
    clean = words if key == "none" else words.replace(key, "[key]")
    return NoReplyError(shown(clean, 300), fatal=status in HOPELESS_STATUS, free=free)


def _read_completion(found: object) -> Reply:
    """Of OpenAI's chat completions. Raises ValueError where it has not their shape."""
    choices = getattr(found, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    content = getattr(message, "content", None)
    if message is None or not (content is None or isinstance(content, str)):
        raise ValueError(f"no message in {shown(found)}")
    refused = bool(getattr(message, "refusal", None))
    finish = str(getattr(choices[0], "finish_reason", None)) if choices else ""
    usage = getattr(found, "usage", None)
    return Reply(
        content or "",
        "refusal" if refused else OPENAI_FINISH.get(finish, finish),
        _count(getattr(usage, "prompt_tokens", None)),
        _count(getattr(usage, "completion_tokens", None)),
    )


def _read_message(found: object) -> Reply:
    """Of Anthropic's messages, their text blocks. Raises ValueError where it has not their shape."""
    content = getattr(found, "content", None)
    if not isinstance(content, list):
        raise ValueError(f"no content in {shown(found)}")
    texts = [getattr(block, "text", None) for block in content if getattr(block, "type", None) == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text blocks without text in {shown(found)}")
    finish, usage = str(getattr(found, "stop_reason", None)), getattr(found, "usage", None)
    return Reply(
        "".join(map(str, texts)),
        ANTHROPIC_FINISH.get(finish, finish),
        _count(getattr(usage, "input_tokens", None)),  # all of them: nothing here asks for prompt caching
        _count(getattr(usage, "output_tokens", None)),
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
