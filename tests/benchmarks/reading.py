"""How fast labels become training batches: the cache, against Parquet lists through datasets and a raw memory map.

The same random-looking labels three ways, read in random order as batches of 8 examples, with and without the collator
that all three share, which brings them to T=2; in one run, medians of 5. Of Parquet, the slow one, only 16 batches are
read a round. Run as ``python -m tests.benchmarks.reading`` (about two minutes).
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache.labels import Example, Shard, SparseTargets
from logitcask.cache.reader import CacheReader
from logitcask.cache.writer import create_cache
from logitcask.pipeline.batches.collate import Collator, TrainingExample
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.precompute.sharding import cut_shards
from logitcask.pipeline.text.tokens.encoded import Encoded
from tests.benchmarks.record import Ratio, record
from tests.cache.test_cache import FILES, label_settings, manifest_of, random_targets

EXAMPLES, LENGTH, BATCH, ROUNDS, VOCABULARY = 1024, 128, 8, 5, 49_152
SHARD_POSITIONS = 32_768
LABEL = label_settings(VOCABULARY, 8, 24)
NAMES = [field.name for field in fields(SparseTargets)]
Read = Callable[[int], TrainingExample]


def examples() -> list[Example]:
    """Return examples of full length with every position labelled except the last."""
    random = np.random.default_rng(0)
    mask = np.arange(LENGTH) < LENGTH - 1
    pool = random_targets(random, 4096, LABEL)
    picks = [random.integers(0, len(pool.gold_logprobs), LENGTH - 1) for _ in range(EXAMPLES)]
    return [
        Example(
            random.integers(0, VOCABULARY, LENGTH),
            mask,
            SparseTargets(**{name: getattr(pool, name)[rows] for name in NAMES}),
        )
        for rows in picks
    ]


def from_cache(folder: Path, made: list[Example]) -> Read:
    """Write the cache and return how to read it."""
    shard_examples = cut_shards(np.array([len(e.targets) for e in made]), SHARD_POSITIONS)
    ends = np.cumsum(shard_examples)
    shards = [Shard.of(made[int(e - n) : int(e)]) for e, n in zip(ends, shard_examples, strict=True)]
    manifest, counts = manifest_of(LABEL, shards)
    data = manifest.data.model_copy(update={"max_seq_length": LENGTH, "longest": LENGTH})
    manifest = manifest.model_copy(update={"data": data})
    writer = create_cache(folder, manifest, counts, FILES)
    for index, shard in enumerate(shards):
        writer.write_shard(index, shard)
    found = CacheExamples(str(folder), with_targets=True)
    return lambda index: found[index]


def columns_of(example: Example) -> dict[str, Any]:
    """Return one example's arrays by name, in the narrowest types that suffice."""
    return {
        "input_ids": example.input_ids.astype(np.uint16),
        "target_mask": example.target_mask,
        **{
            name: getattr(example.targets, name).astype(
                np.uint16 if name.endswith("ids") else np.uint8 if name == "tail_counts" else np.float32
            )
            for name in NAMES
        },
    }


def example_of(row: dict[str, Any]) -> TrainingExample:
    """Return a training example from arrays by name."""
    targets = SparseTargets(**{name: row[name] for name in NAMES})
    return TrainingExample(Encoded(row["input_ids"], row["target_mask"]), targets)


def from_parquet(folder: Path, made: list[Example]) -> Read:
    """Write lists to a Parquet file, as most projects store them."""
    import datasets

    datasets.disable_progress_bars()

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({name: value.tolist() for name, value in columns_of(example).items()} for example in made)

    path = str(folder / "labels.parquet")
    datasets.Dataset.from_generator(rows, cache_dir=str(folder / "made")).to_parquet(path)
    found = datasets.Dataset.from_parquet(path, cache_dir=str(folder / "read"))
    types = {name: value.dtype for name, value in columns_of(made[0]).items()}
    return lambda index: example_of({name: np.array(value, types[name]) for name, value in found[index].items()})


def from_memmap(folder: Path, made: list[Example]) -> Read:
    """Write one flat uncompressed file per array, all examples of equal size: the fastest option."""
    folder.mkdir()
    shapes = {name: value.shape for name, value in columns_of(made[0]).items()}
    whole = {name: np.stack([columns_of(e)[name] for e in made]) for name in shapes}
    for name, value in whole.items():
        value.tofile(folder / name)
    maps = {name: np.memmap(folder / name, value.dtype, "r", shape=value.shape) for name, value in whole.items()}
    return lambda index: example_of({name: np.array(value[index]) for name, value in maps.items()})


def positions_a_second(read: Read, batches: list[list[int]], finish: Callable[[list[TrainingExample]], Any]) -> float:
    """Return target positions delivered per second, with ``finish`` applied to each batch's examples."""
    began = time.perf_counter()
    for batch in batches:
        finish([read(index) for index in batch])
    return sum(map(len, batches)) * (LENGTH - 1) / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    made = examples()
    with tempfile.TemporaryDirectory() as place:
        ways = {
            "cache": from_cache(Path(place) / "cache", made),
            "Parquet lists": from_parquet(Path(place), made),
            "memory map": from_memmap(Path(place) / "maps", made),
        }
        sampler = BatchSampler(CacheReader(Path(place) / "cache").shard_starts, np.zeros(0, dtype=np.int64), BATCH, 0)
        finishes: dict[str, Callable[[list[TrainingExample]], Any]] = {
            "batches": Collator(0, tuple(LABEL.temperatures), 2.0, "sampled"),
            "examples alone": len,
        }
        rates: dict[tuple[str, str], list[float]] = {(name, what): [] for name in ways for what in finishes}
        for epoch in range(1, ROUNDS + 1):
            sampler.set_epoch(epoch)
            order = list(sampler)  # the cache's order: shards, then examples within them
            for (name, what), found in rates.items():
                some = order[:16] if name == "Parquet lists" else order
                found.append(positions_a_second(ways[name], some, finishes[what]))
    median = {key: statistics.median(found) for key, found in rates.items()}
    print(f"{EXAMPLES} examples of {LENGTH} tokens, batches of {BATCH}, medians of {ROUNDS}; positions/s")
    for (name, what), rate in median.items():
        print(f"{name:14s}{what:15s}{rate:12,.0f}   cache / this = {median['cache', what] / rate:.2f}")
    others = [(name, what) for name, what in rates if name != "cache"]
    record(
        "reading",
        {
            f"{what}, positions/s: cache / {name}": Ratio(rates["cache", what], rates[name, what], more_is_better=True)
            for name, what in others
        },
    )


if __name__ == "__main__":
    main()
