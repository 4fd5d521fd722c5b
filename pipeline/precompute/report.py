"""What a run of stage 1 prints: its data and teacher, the shard it is at, its end and what comes next."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from logitcask.cache.integrity import committed_shards
from logitcask.cache.manifest import DataIdentity, Manifest
from logitcask.cache.storage.open import object_sizes, open_store
from logitcask.pipeline.console import amount, counted, duration, size
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.teacher import TeacherFacts

OWNERS = {"vllm-topk": "vLLM's own", "server": "the server's"}


@dataclass(frozen=True)
class PrecomputeReport:
    """What a run of stage 1 did."""

    manifest: Manifest
    shards_written: int
    shards_found: int
    seconds: float


def data_line(data: DataIdentity) -> str:
    """Return how much there is to label, and what was cut."""
    cut = f"; {data.truncated:,} truncated at {data.max_seq_length:,}" if data.truncated else ""
    dropped = f"; {data.dropped:,} dropped: no target left" if data.dropped else ""
    counts = f"{data.examples:,} examples, {amount(data.tokens)} tokens, {amount(data.positions)} target positions"
    return f"{counts}{cut}{dropped}"


def teacher_line(facts: TeacherFacts) -> str:
    """Return which teacher runs, in which dtype, by what and where."""
    teacher, by = facts.identity, facts.made_by
    versions = ", ".join(f"{name} {v}" for name, v in by.versions.items() if name not in ("logitcask", "torch"))
    return f"{teacher.id}, {teacher.dtype}, {versions}" + (f" on {by.device}" if by.device else "")


def shard_place(tokens: Sequence[int]) -> Callable[[int], str]:
    """Return a function from the tokens that are done to ``shard 12/196``: which one they end in.

    ``tokens`` are those of each shard to write, in order.
    """
    ends, count = np.cumsum(tokens), len(tokens)
    return lambda done: f"shard {min(count, 1 + int(np.searchsorted(ends, done, side='right'))):,}/{count:,}"


def result_line(settings: PrecomputeSettings, report: PrecomputeReport) -> tuple[str, str]:
    """Return the label and the text of a run's result."""
    part = f" of part {settings.shards}" if settings.shards else ""
    if not report.shards_written:
        return "complete", f"{settings.output} has all {counted(report.shards_found, 'shard')}{part}; nothing to do"
    shards = report.shards_written + report.shards_found
    text = f"{settings.output}: {counted(shards, 'shard')}{part}"
    if not settings.shards:
        total = sum(object_sizes(open_store(settings.output, read_only=True)).values())
        text += f", {size(total)}, {total / report.manifest.data.positions:,.0f} bytes per position"
    return "done", f"{text}, {duration(report.seconds)}"


def after_lines(settings: PrecomputeSettings, report: PrecomputeReport) -> Iterator[tuple[str, str]]:
    """Yield the labels and texts of what to know, and to do, after shards were written."""
    if not report.shards_written:
        return
    if owner := OWNERS.get(settings.engine):
        yield "labels", f"{owner}: only the head at T=1, no draws, no other temperature"
    count = report.manifest.shards.count
    here = len(committed_shards(open_store(settings.output, read_only=True), count)) if settings.shards else count
    missing = f"the {count - here:,} of {count:,} shards that other parts have to write, then " if here < count else ""
    yield "next", f"{missing}logitcask train --cache {shlex.quote(str(settings.output))} --student-model …"
