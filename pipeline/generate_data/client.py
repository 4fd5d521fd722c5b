"""Ask a model many prompts concurrently within a spending limit, and hand on each reply as it arrives.

The most that a request can cost is reserved before it is sent: the bytes of its prompt, which are at least as many as
its tokens, and the maximum number of response tokens.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from logitcask.pipeline.console import Advance
from logitcask.pipeline.generate_data.prompts import Prompt

OVERHEAD = 256  # upper bound on the tokens that a chat template adds to a prompt
MAX_CONSECUTIVE_FAILURES = 10  # prompts in a row without a reply after which the rest are not tried


class Scores(BaseModel):
    """A reply's tokens as the model gave them: ids of the prompt, and per token of the reply its log-probability.

    ``top`` has the most probable tokens at each, by id, most probable first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Reply:
    """A model's reply. ``finish``: ``stop``, ``length``, ``refusal``, or the provider's own word for another reason."""

    text: str
    finish: str
    input_tokens: int | None  # None if the provider does not report it
    output_tokens: int | None
    scores: Scores | None = None  # if they were asked for


class NoReplyError(Exception):
    """A prompt got no reply. ``fatal``: no other prompt would either; ``free``: the server refused, so no charge."""

    def __init__(self, message: str, *, fatal: bool, free: bool) -> None:
        super().__init__(message)
        self.fatal, self.free = fatal, free


Ask = Callable[[str], Awaitable[Reply]]


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens; ``longest`` is the maximum number of tokens per response."""

    input: float
    output: float
    longest: int

    def most(self, prompt: str) -> float:
        """Return the most that a prompt can cost, in dollars."""
        return self.cost(len(prompt.encode()) + OVERHEAD, self.longest)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the cost of these numbers of tokens, in dollars."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6

    def paid(self, prompt: str, input_tokens: int | None, output_tokens: int | None) -> float:
        """Return the cost of a reply, in dollars: the most it can cost if its token counts are unknown."""
        if input_tokens is None or output_tokens is None:
            return self.most(prompt)
        return self.cost(input_tokens, output_tokens)


@dataclass
class Outcome:
    """How a round of requests went: prompts without a reply, the last reason, and why the rest were not sent."""

    failed: int = 0
    reason: str = ""
    stopped: str = ""  # "", "max-cost" or "failures"


class Spending:
    """Dollars spent and reserved, within a limit (None: no limit)."""

    def __init__(self, limit: float | None, spent: float) -> None:
        self._limit, self.spent = limit, spent
        self._reserved: list[float] = []
        self._changed = asyncio.Condition()

    async def reserve(self, most: float) -> bool:
        """Wait until ``most`` fits beside the requests under way; return False if it cannot even fit alone."""
        async with self._changed:
            while self._limit is not None and self.spent + sum(self._reserved) + most > self._limit:
                if not self._reserved:
                    return False
                await self._changed.wait()
            self._reserved.append(most)
            return True

    async def settle(self, most: float, paid: float) -> None:
        """Replace the reservation of ``most`` by what was actually paid."""
        async with self._changed:
            self._reserved.remove(most)
            self.spent += paid
            self._changed.notify_all()


async def ask_all(
    prompts: Sequence[Prompt],
    ask: Ask,
    *,
    concurrency: int,
    price: Price | None,
    spending: Spending,
    on_reply: Callable[[Prompt, Reply], None],
    advance: Advance,
) -> Outcome:
    """Ask every prompt, ``concurrency`` at once, and pass each reply to ``on_reply``.

    Requests under way are always awaited, also when the rest are given up.
    """
    outcome, waiting, in_a_row = Outcome(), iter(prompts), 0

    async def ask_one(prompt: Prompt, most: float) -> None:
        nonlocal in_a_row
        paid = most
        try:
            reply = await ask(prompt.text)
            paid = price.paid(prompt.text, reply.input_tokens, reply.output_tokens) if price else 0.0
            on_reply(prompt, reply)
            in_a_row = 0
        except NoReplyError as error:
            paid = 0.0 if error.free else most
            in_a_row += 1
            outcome.failed, outcome.reason = outcome.failed + 1, str(error)
            if error.fatal or in_a_row >= MAX_CONSECUTIVE_FAILURES:
                outcome.stopped = "failures"
        finally:
            await spending.settle(most, paid)

    async def work() -> None:
        for prompt in waiting:  # all workers share the iterator: each prompt goes to one of them
            most = price.most(prompt.text) if price else 0.0
            if outcome.stopped:
                return
            if not await spending.reserve(most):
                outcome.stopped = outcome.stopped or "max-cost"
                return
            await ask_one(prompt, most)
            advance(1, f"${spending.spent:,.2f}" if price else "cost unknown")

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(work())
    return outcome
