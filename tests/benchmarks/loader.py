"""What reading the cache costs per step of a student: no worker and one, against all batches already in memory.

Run as ``python -m tests.benchmarks.loader CACHE [tiny] [100m]`` with a cache of SmolLM2's vocabulary, such as the
demo's; tiny alone, the default, takes a minute or two on two cores. The Trainer itself trains on batches of 4; a round
runs each way once, in turn; medians of 5 rounds. The share is the loader's own time for a batch, of the step with
everything in memory.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

import logitcask as lc
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import Collator, TrainingExample
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import BatchSampler, held_out
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.text.tokenizer import tokenizer_from_files
from logitcask.pipeline.train.arguments import training_arguments
from logitcask.pipeline.train.callbacks.nonfinite import Labels, StopOnNonFinite
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.benchmarks.record import Ratio, record
from tests.support.runs import train_settings

ROUNDS, BATCH = 5, 4
STEPS = {"tiny": 8, "100m": 3}


class Timed(TrainerCallback):
    """Times at which steps ended; the first step, which starts the worker and the optimizer, is left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


class InMemory(CacheExamples):
    """Examples read beforehand; the batches that the collator makes of them are in memory too."""

    def __init__(self, path: str) -> None:
        super().__init__(path, with_targets=True)
        self.kept = [super(InMemory, self).__getitem__(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> TrainingExample:
        return self.kept[index]


class Kept:
    """A collator that caches its batches."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator
        self._found: dict[tuple[int, ...], Any] = {}

    def __call__(self, examples: list[TrainingExample]) -> Any:
        """Return the batch of these examples."""
        key = tuple(map(id, examples))
        if key not in self._found:
            self._found[key] = self._collator(examples)
        return dict(self._found[key])


def trainer_of(name: str, cache: str, folder: str, workers: int, *, kept: bool) -> tuple[DistillationTrainer, Timed]:
    """Return a Trainer of a student that reads the cache or has every batch in memory."""
    reader = CacheReader(cache)
    label = reader.manifest.label
    config = Path(f"configs/students/{name}.json")
    settings = train_settings(cache, Path(folder), student_config=config, max_steps=STEPS[name], num_workers=workers,
                              batch_size=BATCH, logging_steps=1000)  # fmt: skip
    arguments = training_arguments(settings)
    arguments.save_strategy = SaveStrategy.NO
    model = student_from_config(config, label.vocab_size)
    examples = InMemory(cache) if kept else CacheExamples(cache, with_targets=True)
    sampler = BatchSampler(reader.shard_starts, held_out(len(reader), 0.0, 0), BATCH, 0)
    plain = Collator(0, tuple(label.temperatures), 2.0, "sampled")
    collator: Any = Kept(plain) if kept else plain
    if kept:
        for batch in list(sampler)[: STEPS[name] + 1]:
            collator([examples[index] for index in batch])
    timed = Timed()
    nonfinite = StopOnNonFinite(Path(folder), step_examples=sampler.step_examples, held_out=[], learning_rate=1e-3,
                                labels=Labels(lambda index: True), warmup_steps=0, fp16=False)  # fmt: skip
    trainer = DistillationTrainer(
        model=model, args=arguments, examples=examples, sampler=sampler,
        collator=collator, tokenizer=tokenizer_from_files(reader.tokenizer_files()),
        nonfinite=nonfinite, callbacks=[timed], loss=LossSettings(0.5, 2.0, "sampled", "forward-kl"),
    )  # fmt: skip
    return trainer, timed


def seconds_a_step(name: str, cache: str, workers: int, *, kept: bool) -> float:
    """Return the mean seconds per step after the first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, timed = trainer_of(name, cache, folder, workers, kept=kept)
        trainer.train()
    return (timed.ends[-1] - timed.ends[0]) / (len(timed.ends) - 1)


def alone(loader: Iterable[Any]) -> tuple[float, float]:
    """Return a loader's seconds of processor time per batch, and target positions per second; shards are decoded."""
    began, positions, batches = time.process_time(), 0, 0
    for batch in loader:
        positions, batches = positions + len(batch["gold"]), batches + 1
    seconds = time.process_time() - began
    return seconds / batches, positions / seconds


def trains(cache: str) -> Iterable[Any]:
    """Return the loader of `logitcask train`, without workers."""
    reader = CacheReader(cache)
    sampler = BatchSampler(reader.shard_starts, held_out(len(reader), 0.0, 0), BATCH, 0)
    collator = Collator(0, tuple(reader.manifest.label.temperatures), 2.0, "sampled", packed=True)
    examples: Any = CacheExamples(cache, with_targets=True)
    return DataLoader(examples, batch_sampler=sampler, collate_fn=collator)


def compare_loaders(cache: str) -> float:
    """Print what lc.loader and train's own loader deliver, in turn; return the seconds per batch of train's."""
    pairs = [
        (alone(trains(cache)), alone(lc.loader(lc.open(cache), BATCH, 2.0, packed=True))) for _ in range(4 * ROUNDS)
    ]
    train, ours = (statistics.median(pair[i][1] for pair in pairs) for i in (0, 1))
    print(
        f"target positions/s: lc.loader {ours:,.0f}, train's loader {train:,.0f}, ratio {ours / train:.3f}; medians of "
        f"{4 * ROUNDS}, batches of {BATCH}"
    )
    ours_each, train_each = ([pair[i][1] for pair in pairs] for i in (1, 0))
    record("loader", {"positions/s: lc.loader / train's": Ratio(ours_each, train_each, more_is_better=True)})
    return statistics.median(pair[0][0] for pair in pairs)


def main() -> None:
    """Print the table."""
    cache = sys.argv[1]
    ways: dict[str, Callable[[str], float]] = {
        "in memory": lambda name: seconds_a_step(name, cache, 0, kept=True),
        "no worker": lambda name: seconds_a_step(name, cache, 0, kept=False),
        "one worker": lambda name: seconds_a_step(name, cache, 1, kept=False),
    }
    table = Table(
        "student", *(f"{way}, s a step" for way in ways), "no worker / memory", "one worker / memory", "share"
    )
    loading = compare_loaders(cache)
    for name in sys.argv[2:] or ["tiny"]:
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                found[way].append(run(name))
        memory, *read = found.items()
        record("loader", {f"{name}: s a step, {way} / in memory": Ratio(times, memory[1]) for way, times in read})
        base, *others = (statistics.median(times) for times in found.values())
        share = loading / base
        words = [f"{seconds:.3f}" for seconds in (base, *others)] + [f"{other / base:.3f}" for other in others]
        table.add_row(name, *words, f"{share:.1%}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
