"""The mixin's step under Trainer against that of `logitcask train`; kd_loss_from_logits against a top-k gather.

`python -m tests.benchmarks.library_step`: ratios of medians of runs that take turns, in processor
time, which other load changes less; with OMP_NUM_THREADS=1.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainerCallback

import logitcask as lc
from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.batches.collate import Collator
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.train.arguments import training_arguments
from logitcask.pipeline.train.callbacks.nonfinite import Labels, StopOnNonFinite
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.support.distilled import make_student
from tests.support.runs import train_settings
from tests.support.tiny import RECORDS, make_cache, make_tokenizer, write_jsonl

STEPS, ROUNDS = 40, 5
POSITIONS, VOCABULARY, ENTRIES = 512, 32_768, 32


class MixinTrainer(lc.DistillationMixin, Trainer):
    """What a user writes."""


class Timed(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Median seconds per step."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def of_train(cache: Path, folder: Path) -> float:
    """Return the seconds per step of the Trainer of `logitcask train`."""
    opened, timed = lc.open(cache), Timed()
    examples = CacheExamples(str(cache), with_targets=True)
    reader = examples.reader
    sampler = BatchSampler(reader.shard_starts, torch.zeros(0, dtype=torch.long).numpy(), 8, 0)
    nonfinite = StopOnNonFinite(folder, step_examples=sampler.step_examples, held_out=[], learning_rate=1e-3,
                                labels=Labels(lambda index: True), warmup_steps=0, fp16=False)  # fmt: skip
    arguments = training_arguments(train_settings(cache, folder, max_steps=STEPS, logging_steps=1000))
    arguments.save_strategy = "no"
    DistillationTrainer(
        model=make_student(), args=arguments, examples=examples, sampler=sampler, callbacks=[timed],
        collator=Collator(0, tuple(opened.temperatures), 1.0, "sampled", True), tokenizer=make_tokenizer(),
        nonfinite=nonfinite, loss=LossSettings(0.1, 1.0, "sampled", "forward-kl"),
    ).train()  # fmt: skip
    return timed.seconds


def of_mixin(cache: Path, folder: Path) -> float:
    """Return the seconds per step of the mixin under Trainer, with the same arguments."""
    opened, timed = lc.open(cache), Timed()
    arguments = training_arguments(train_settings(cache, folder, max_steps=STEPS, logging_steps=1000))
    arguments.save_strategy = "no"
    MixinTrainer(make_student(), arguments, train_dataset=opened.dataset(), callbacks=[timed],
                 data_collator=opened.collator(temperature=1.0, packed=True)).train()  # fmt: skip
    return timed.seconds


def label_batch(temperature: float) -> dict[str, Any]:
    """Return a batch of random labels."""
    ids = torch.rand(POSITIONS, VOCABULARY).topk(ENTRIES).indices
    log_probs = torch.log_softmax(torch.randn(POSITIONS, ENTRIES), dim=1)
    labels = SoftLabels(ids, log_probs.exp(), log_probs, torch.full((POSITIONS,), -9.0), 8)
    input_ids = torch.randint(0, VOCABULARY, (1, POSITIONS + 1))
    index = torch.arange(POSITIONS)
    return {"input_ids": input_ids, "target_index": index, "gold": input_ids[0, 1:],
            "soft_labels": replace(labels, temperature=temperature)}  # fmt: skip


def by_hand(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the same loss as people write it: log-softmax, gather the top-k, sum."""
    labels, z = batch["soft_labels"], logits[0, :-1].float()
    t = labels.temperature
    log_q = functional.log_softmax(z / t, dim=-1).gather(-1, labels.ids)
    soft = (labels.weights * (labels.log_probs - log_q)).sum(-1).mean() * t * t
    total: Tensor = 0.1 * functional.cross_entropy(z, batch["gold"]) + 0.9 * soft
    return total


def plain(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return ours."""
    loss: Tensor = lc.kd_loss_from_logits(logits, batch, alpha=0.1)
    return loss


def seconds_of(loss: Callable[[Tensor, dict[str, Any]], Tensor], logits: Tensor, batch: dict[str, Any]) -> float:
    """Return the seconds of a loss and its backward pass."""
    logits.grad = None
    began = time.process_time()
    torch.autograd.backward(loss(logits, batch))
    return time.process_time() - began


def report(name: str, ours: list[float], other: list[float]) -> None:
    """Print both medians and the ratio of the second to the first."""
    a, b = statistics.median(ours), statistics.median(other)
    print(f"{name}: {1e3 * a:.2f} ms, the other {1e3 * b:.2f} ms, other / ours {b / a:.3f}, ours / other {a / b:.3f}")


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_jsonl(
            folder / "many.jsonl", [{**r, "prompt": f"{n} {r['prompt']}"} for n in range(16) for r in RECORDS]
        )
        cache = make_cache(folder, train_data=str(data), shard_positions=512)
        runs = [(of_mixin(cache, folder / "a"), of_train(cache, folder / "b")) for _ in range(ROUNDS)]
    report("step of the mixin against train's", [a for a, _ in runs], [b for _, b in runs])
    for temperature in (1.0, 2.0):
        batch, logits = label_batch(temperature), torch.randn(1, POSITIONS + 1, VOCABULARY, requires_grad=True)
        torch.testing.assert_close(plain(logits, batch), by_hand(logits, batch))
        pairs = [(seconds_of(plain, logits, batch), seconds_of(by_hand, logits, batch)) for _ in range(4 * ROUNDS)]
        report(
            f"kd_loss_from_logits at T={temperature:g} against a gather", [a for a, _ in pairs], [b for _, b in pairs]
        )


if __name__ == "__main__":
    main()
