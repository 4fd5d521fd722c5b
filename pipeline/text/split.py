"""``logitcask split``: data cut into a training and a test file, duplicates on one side. Two passes over the data."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import track
from logitcask.pipeline.text.columns import RecordError, shape_record
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.records import Raw


@dataclass(frozen=True)
class Split:
    """What was written: files, and examples in each."""

    train: Path
    test: Path
    train_examples: int
    test_examples: int


def split_data(reading: Reading, output_dir: Path, test: int, seed: int) -> Split:
    """Write ``train.jsonl`` and ``test.jsonl``, the latter with ``test`` examples, a few more if there are duplicates.

    Which side a record is on depends on its text and the seed alone, so more data at the end moves few records. Memory:
    8 bytes per example. Raises LogitcaskError if a file exists or the data has too few examples.
    """
    files = output_dir / "train.jsonl", output_dir / "test.jsonl"
    for file in files:
        if file.exists():
            raise LogitcaskError(f"{file}: already exists: choose another --output-dir or remove it")
    ranks = array("Q")
    with track("reading", None, "examples") as advance:
        for where, record in _all(reading):
            if isinstance(record, RecordError):
                raise LogitcaskError(f"{where}: {record}")
            ranks.append(_rank(record, seed))
            advance(1)
    limit = _limit(np.frombuffer(ranks, dtype=np.uint64), test)
    output_dir.mkdir(parents=True, exist_ok=True)
    counts = [0, 0]
    partial = [file.with_suffix(".partial") for file in files]
    with partial[0].open("w") as train_file, partial[1].open("w") as test_file:
        for _, record in _all(reading):
            if isinstance(record, RecordError):
                continue  # it was read above, so the file has changed: the counts differ
            side = int(_rank(record, seed) <= limit)
            (train_file, test_file)[side].write(json.dumps(record) + "\n")
            counts[side] += 1
    if sum(counts) != len(ranks):
        raise LogitcaskError(f"{', '.join(reading.sources)}: changed while it was read: run the same command again")
    for written, file in zip(partial, files, strict=True):
        written.replace(file)
    return Split(*files, *counts)


def _all(reading: Reading) -> Iterator[Raw]:
    for source in reading.sources:
        yield from reading(source)


def _rank(record: dict[str, Any], seed: int) -> int:
    """Return a number in [0, 2^64) that depends on the record's text and the seed: duplicates have the same."""
    try:
        text: Any = asdict(replace(shape_record(record, {}), unused=frozenset()))
        text["unused"] = []
    except RecordError:
        text = record
    content = json.dumps(text, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(f"{seed} {content}".encode()).digest()[:8])


def _limit(ranks: NDArray[np.uint64], test: int) -> int:
    """Return the greatest rank of the test side. Raises LogitcaskError if no training example would be left."""
    distinct, counts = np.unique(ranks, return_counts=True)
    place = int(np.searchsorted(np.cumsum(counts), test))
    if place + 1 >= len(distinct):
        raise LogitcaskError(
            f"--test {test}: the data has {len(ranks)} examples, {len(distinct)} different: ask for fewer"
        )
    return int(distinct[place])
