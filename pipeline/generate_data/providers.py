"""Models behind an API, through the providers' own packages, which retry a request as the server's headers ask.

Both packages retry 408, 409, 429, 5xx, timeouts and broken connections, after ``retry-after`` where the server sends
it (openai: up to two minutes, beyond that it gives up; anthropic: any) or else after 0.5 to 8 s. Keys come from the
environment, are sent only to their own server, and are removed from every message.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.generate_data.client import Ask, NoReplyError, Reply, Scores

# package, environment variable that holds the key
PROVIDERS = {
    "openai": ("openai", "OPENAI_API_KEY"),
    "openai-compatible": ("openai", "OPENAI_COMPATIBLE_API_KEY"),
    "anthropic": ("anthropic", "ANTHROPIC_API_KEY"),
}
FATAL_STATUS = {401, 402, 403, 404}  # a wrong key, account or model: another prompt would fail too
MOST_MASS = 1.01  # of the most probable tokens
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
    logprobs: int | None,
) -> AsyncIterator[Ask]:
    """Yield a function that asks the model one prompt; ``timeout`` is in seconds per attempt.

    With ``logprobs`` replies have scores of so many tokens, which only vLLM's servers give.

    Raises LogitcaskError if the key is missing. The function raises NoReplyError.
    """
    name, variable = PROVIDERS[provider]
    sdk, key = import_module(name), _key(provider, variable)
    common: dict[str, Any] = {"api_key": key, "timeout": timeout, "max_retries": max_retries}
    if provider == "openai-compatible":
        common["base_url"] = base_url
    client = sdk.AsyncAnthropic(**common) if provider == "anthropic" else sdk.AsyncOpenAI(**common)
    if provider == "openai-compatible":
        client.organization = client.project = None  # OPENAI_ORG_ID and OPENAI_PROJECT_ID are meant for OpenAI alone
    request: dict[str, Any] = {"model": model} | ({} if temperature is None else {"temperature": temperature})
    request["max_completion_tokens" if provider == "openai" else "max_tokens"] = max_new_tokens
    if logprobs is not None:  # one more, since the token that was drawn takes the place of the last if it is no top one
        request |= {"logprobs": True, "top_logprobs": logprobs + 1}
        request["extra_body"] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    send: Callable[..., Awaitable[object]] = (
        client.messages.create if provider == "anthropic" else client.chat.completions.create
    )
    read = _read_message if provider == "anthropic" else _read_completion
    patience = (timeout + LONGEST_WAIT) * (max_retries + 1)

    async def ask(prompt: str) -> Reply:
        try:
            async with asyncio.timeout(patience):
                response = await send(messages=[{"role": "user", "content": prompt}], **request)
            reply = read(response)
            return reply if logprobs is None else replace(reply, scores=_read_scores(response, logprobs))
        except Exception as error:
            raise _no_reply(error, sdk, key) from error

    async with client:
        yield ask


def _key(provider: str, variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if key or provider == "openai-compatible":
        return key or "none"  # a local server seldom wants a key, the package always does
    raise LogitcaskError(f"--provider {provider} needs a key: set the environment variable {variable}")


def _no_reply(error: Exception, sdk: ModuleType, key: str) -> NoReplyError:
    """Describe the error in one line without the key. Raises the error itself if it is not the server's."""
    status = error.status_code if isinstance(error, sdk.APIStatusError) else None
    if status is not None:
        words, free = str(error), True
    elif isinstance(error, sdk.APITimeoutError | TimeoutError):
        words, free = "no reply in time", False
    elif isinstance(error, sdk.APIConnectionError):
        words, free = f"no connection ({error.__cause__ or error})", False
    elif isinstance(error, sdk.APIError | ValueError):  # malformed JSON, or JSON of another shape
        words, free = f"malformed reply: {error}", False
    else:
        raise error
    clean = words if key == "none" else words.replace(key, "[key]")
    capped = status == 400 and "logprobs" in clean and "max allowed" in clean
    remedy = (
        ": start vLLM with a higher --max-logprobs, or lower --logprobs, of which one more is asked" if capped else ""
    )
    return NoReplyError(shown(clean, 300) + remedy, fatal=status in FATAL_STATUS or capped, free=free)


def _read_completion(response: object) -> Reply:
    """Read one of OpenAI's chat completions. Raises ValueError if it has another shape."""
    choices = getattr(response, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    content = getattr(message, "content", None)
    if message is None or not (content is None or isinstance(content, str)):
        raise ValueError(f"no message in {shown(response)}")
    refused = bool(getattr(message, "refusal", None))
    finish = str(getattr(choices[0], "finish_reason", None)) if choices else ""
    usage = getattr(response, "usage", None)
    return Reply(
        content or "",
        "refusal" if refused else OPENAI_FINISH.get(finish, finish),
        _count(getattr(usage, "prompt_tokens", None)),
        _count(getattr(usage, "completion_tokens", None)),
    )


def _read_scores(response: Any, count: int) -> Scores:
    """Read the ids and log-probabilities that vLLM adds to a chat completion. Raises ValueError if they are missing."""
    try:
        content = response.choices[0].logprobs.content
        top = [[(_token_id(entry.token), float(entry.logprob)) for entry in each.top_logprobs] for each in content]
        scores = Scores(
            prompt=response.prompt_token_ids,
            tokens=[_token_id(each.token) for each in content],
            logprobs=[each.logprob for each in content],
            top=[sorted(row, key=lambda entry: -entry[1])[:count] for row in top],
        )
    except (AttributeError, TypeError, IndexError, ValueError) as error:
        raise ValueError("no token ids with log-probabilities in it: --logprobs needs a server of vLLM's") from error
    if not scores.tokens or scores.tokens != list(response.choices[0].token_ids or ()):
        raise ValueError("its log-probabilities are not those of its tokens")
    if any(sum(math.exp(min(value, 1.0)) for _, value in row) > MOST_MASS for row in scores.top):
        raise ValueError("its numbers are no log-probabilities: start vLLM with --logprobs-mode raw_logprobs")
    if any(len(row) < count for row in scores.top):
        raise ValueError(f"it has fewer than {count} log-probabilities at a token: lower --logprobs")
    return scores


def _token_id(text: str) -> int:
    """Return the id in ``token_id:7``. Raises ValueError if there is none."""
    return int(text.removeprefix("token_id:"))


def _read_message(response: object) -> Reply:
    """Read the text blocks of one of Anthropic's messages. Raises ValueError if it has another shape."""
    content = getattr(response, "content", None)
    if not isinstance(content, list):
        raise ValueError(f"no content in {shown(response)}")
    texts = [getattr(block, "text", None) for block in content if getattr(block, "type", None) == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text blocks without text in {shown(response)}")
    finish, usage = str(getattr(response, "stop_reason", None)), getattr(response, "usage", None)
    return Reply(
        "".join(map(str, texts)),
        ANTHROPIC_FINISH.get(finish, finish),
        _count(getattr(usage, "input_tokens", None)),  # the total: no request asks for prompt caching
        _count(getattr(usage, "output_tokens", None)),
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
