"""Asking a model: many prompts at once, never beyond a number of dollars, each reply handed on as it comes.

Dollars that a request may cost are set aside before it is sent: its prompt's bytes, which are at least its tokens, and
the greatest number of tokens of a response.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from logitcask.pipeline.console import Advance
from logitcask.pipeline.generate_data.prompts import Prompt

OVERHEAD = 256  # tokens that a chat template puts around a prompt, at most
HOPELESS = 10  # prompts in a row without a reply after which the rest is not tried


@dataclass(frozen=True)
class Reply:
    """What a model gave: the text, ``stop``, ``length``, ``refusal`` or what else ended it, and the tokens it tells."""

    text: str
    finish: str
    input_tokens: int | None
    output_tokens: int | None


class NoReplyError(Exception):
    """A prompt got no reply. ``fatal``: nor would the others; ``free``: the server said no, so nothing is billed."""

    def __init__(self, message: str, *, fatal: bool, free: bool) -> None:
        super().__init__(message)
        self.fatal, self.free = fatal, free


Ask = Callable[[str], Awaitable[Reply]]


@dataclass(frozen=True)
class Price:
    """Dollars a million tokens; ``longest`` is the number of tokens of a response at most."""

    input: float
    output: float
    longest: int

    def most(self, prompt: str) -> float:
        """Dollars that a prompt can cost."""
        return self.cost(len(prompt.encode()) + OVERHEAD, self.longest)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Dollars of so many tokens."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6

    def paid(self, prompt: str, input_tokens: int | None, output_tokens: int | None) -> float:
        """Dollars of a reply; the most it can cost where it does not tell its tokens."""
        if input_tokens is None or output_tokens is None:
            return self.most(prompt)
        return self.cost(input_tokens, output_tokens)


@dataclass
class Outcome:
    """How the asking went: prompts without a reply, the last reason for one, and why the rest was not asked."""

    failed: int = 0
    reason: str = ""
    stopped: str = ""  # "", "max-cost" or "failures"


class Purse:
    """Dollars spent and set aside, within a limit (None: any)."""

    def __init__(self, limit: float | None, spent: float) -> None:
        self._limit, self.spent = limit, spent
        self._aside: list[float] = []
        self._changed = asyncio.Condition()

    async def set_aside(self, most: float) -> bool:
        """Wait until so much fits, beside what runs now; False where it does not even when nothing runs."""
        async with self._changed:
            while self._limit is not None and self.spent + sum(self._aside) + most > self._limit:
                if not self._aside:
                    return False
                await self._changed.wait()
            self._aside.append(most)
            return True

    async def pay(self, most: float, paid: float) -> None:
        """Give back what was set aside but for what was paid."""
        async with self._changed:
            self._aside.remove(most)
            self.spent += paid
            self._changed.notify_all()


async def ask_all(
    prompts: Sequence[Prompt],
    ask: Ask,
    *,
    concurrency: int,
    price: Price | None,
    purse: Purse,
    keep: Callable[[Prompt, Reply], None],
    advance: Advance,
) -> Outcome:
    """Ask every prompt, ``concurrency`` at once; ``keep`` gets each reply. Requests under way are always awaited."""
    outcome, waiting, in_a_row = Outcome(), iter(prompts), 0

    async def ask_one(prompt: Prompt, most: float) -> None:
        nonlocal in_a_row
        paid = most
        try:
            reply = await ask(prompt.text)
            paid = price.paid(prompt.text, reply.input_tokens, reply.output_tokens) if price else 0.0
            keep(prompt, reply)
            in_a_row = 0
        except NoReplyError as error:
            paid = 0.0 if error.free else most
            in_a_row += 1
            outcome.failed, outcome.reason = outcome.failed + 1, str(error)
            if error.fatal or in_a_row >= HOPELESS:
                outcome.stopped = "failures"
        finally:
            await purse.pay(most, paid)

    async def work() -> None:
        for prompt in waiting:  # one iterator for all workers: each prompt goes to one of them
            most = price.most(prompt.text) if price else 0.0
            if outcome.stopped:
                return
            if not await purse.set_aside(most):
                outcome.stopped = outcome.stopped or "max-cost"
                return
            await ask_one(prompt, most)
            advance(1, f"${purse.spent:,.2f}" if price else "cost unknown")

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(work())
    return outcome
