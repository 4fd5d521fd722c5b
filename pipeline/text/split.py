"""``logitcask split``: data cut into a training and a test file, duplicates on one side. Two passes over the data."""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import track
from logitcask.pipeline.text.bad_records import BadRecords, skipped_file
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


def split_data(reading: Reading, output_dir: Path, test: int, seed: int, bad_share: float = 0.0) -> Split:
    """Write ``train.jsonl`` and ``test.jsonl``, the latter with ``test`` examples, a few more if there are duplicates.

    Which side a record is on depends on its text and the seed alone, so more data at the end moves few records. At most
    ``bad_share`` of them may be bad; these are left out. Memory: 8 bytes per example. Raises LogitcaskError if a file
    exists, more records are bad, or the data has too few examples.
    """
    files = output_dir / "train.jsonl", output_dir / "test.jsonl"
    for file in files:
        if file.exists():
            raise LogitcaskError(f"{file}: already exists: choose another --output-dir or remove it")
    ranks = array("Q")
    bad = BadRecords(skipped_file(output_dir), bad_share)
    with bad, track("reading", None, "examples") as advance:
        for where, record in _all(reading):
            bad.read += 1
            try:
                ranks.append(_rank(record, seed, reading.renamed))
            except RecordError as error:
                bad.add(where, str(error), record.value if isinstance(record, RecordError) else record)
            advance(1)
    limit = _limit(np.frombuffer(ranks, dtype=np.uint64), test)
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = [file.with_suffix(".partial") for file in files]
    counts = _write(reading, partial, seed, limit)
    if sum(counts) != len(ranks):
        raise LogitcaskError(f"{', '.join(reading.sources)}: changed while it was read: run the same command again")
    for written, file in zip(partial, files, strict=True):
        written.replace(file)
    return Split(*files, *counts)


def _write(reading: Reading, files: Sequence[Path], seed: int, limit: int) -> list[int]:
    """Write the good records to the files of both sides; return how many went to each."""
    counts = [0, 0]
    with files[0].open("w") as train_file, files[1].open("w") as test_file:
        for _, record in _all(reading):
            with contextlib.suppress(RecordError):
                side = int(_rank(record, seed, reading.renamed) <= limit)
                (train_file, test_file)[side].write(json.dumps(record) + "\n")
                counts[side] += 1
    return counts


def _all(reading: Reading) -> Iterator[Raw]:
    for source in reading.sources:
        yield from reading(source)


def _rank(record: dict[str, Any] | RecordError, seed: int, renamed: Mapping[str, str]) -> int:
    """Return a number in [0, 2^64) that depends on the record's text and the seed: duplicates have the same.

    Raises RecordError if the record is bad.
    """
    if isinstance(record, RecordError):
        raise record
    text: Any = asdict(replace(shape_record(record, renamed), unused=frozenset()))
    text["unused"] = []
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
