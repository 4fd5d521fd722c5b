"""``logitcask cache export``: the heads of a cache's labels as rows that ``datasets`` and the hub's viewer read.

A row is an example: ``input_ids`` and ``labels`` (L,), which are -100 off targets, and for each of its N targets
``token_ids`` and ``logprobs`` (K each, most probable first, as stored), ``log_rest`` and ``gold_logprobs`` at T=1; null
is -infinity.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.cache.labels import Example, FloatArray
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.console import say, track
from logitcask.pipeline.text.tokens.ready import IGNORED_LABEL

Row = dict[str, Any]
ROWS = 64  # examples per group of rows of a Parquet file


def export_labels(cache: str, output: Path, form: str, *, overwrite: bool = False) -> int:
    """Write a cache's heads at T=1 to a file, in the cache's order; return the number of examples.

    The file appears when it is complete. Raises LogitcaskError if it exists, or the cache has no head or no T=1.
    """
    if form not in WRITERS:
        raise LogitcaskError(f"--format: must be {' or '.join(WRITERS)}, got {shown(form)}")
    reader = CacheReader(cache)
    label = reader.manifest.label
    if not label.head_size or 1.0 not in label.temperatures:
        raise LogitcaskError(f"{cache}: has no head at T=1 to export: make a cache with --head-size and temperature 1")
    if output.is_dir():
        raise LogitcaskError(f"{output}: is a folder: --output must name a file in it")
    if output.exists() and not overwrite:
        raise LogitcaskError(f"{output}: already exists: choose another --output or pass --overwrite")
    if label.tail_draws or label.exact or len(label.temperatures) > 1:
        tail = "hidden states" if label.exact else "draws"
        say(f"the head at T=1 is exported; {tail} and other temperatures are left out")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    j, known = label.temperatures.index(1.0), label.knows("rest")
    with track("exporting", len(reader), "examples") as advance:
        rows = (_row(reader.example(index), j, known, advance) for index in range(len(reader)))
        WRITERS[form](partial, rows)
    os.replace(partial, output)
    return len(reader)


def _row(example: Example, j: int, rest_is_known: bool, advance: Callable[[int], None]) -> Row:
    targets, is_target = example.targets, np.roll(example.target_mask, 1)  # which is false at the last token
    advance(1)
    row: Row = {
        "input_ids": example.input_ids.tolist(),
        "labels": np.where(is_target, example.input_ids, IGNORED_LABEL).tolist(),
        "token_ids": targets.head_ids.tolist(),
        "logprobs": [_nullable(values) for values in targets.head_logprobs],
        "log_rest": _nullable(targets.log_tail_mass[:, j]) if rest_is_known else None,
        "gold_logprobs": _nullable(targets.gold_logprobs),
    }
    return row


def _nullable(values: FloatArray) -> list[float | None]:
    """Return numbers, minus infinity as null: JSON has none."""
    return [value if value > -np.inf else None for value in values.tolist()]


def _write_lines(file: Path, rows: Iterator[Row]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")


def _write_parquet(file: Path, rows: Iterator[Row]) -> None:
    integers, numbers = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema(
        {
            "input_ids": integers,
            "labels": integers,
            "token_ids": pyarrow.list_(integers),
            "logprobs": pyarrow.list_(numbers),
            "log_rest": numbers,
            "gold_logprobs": numbers,
        }
    )
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        group: list[Row] = []
        for row in rows:
            group.append(row)
            if len(group) == ROWS:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


WRITERS: dict[str, Callable[[Path, Iterator[Row]], None]] = {"parquet": _write_parquet, "topk-jsonl": _write_lines}
