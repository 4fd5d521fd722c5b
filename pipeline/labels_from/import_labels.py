"""``logitcask cache import``: labels that another tool made become a cache, in random order like stage 1's.

The source is read twice: its first rows decide how it is to be read, then everything is staged on disk and judged as a
whole before a shard is written. A killed import is finished by the same command.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import Example, Shard
from logitcask.cache.manifest import (
    FORMAT_VERSION,
    DataIdentity,
    LabelSettings,
    MadeBy,
    Manifest,
    TeacherIdentity,
)
from logitcask.cache.storage.ownership import sole_writer
from logitcask.cache.writer import CacheWriter, create_cache, require_same, stored_manifest
from logitcask.pipeline.console import say, track
from logitcask.pipeline.labels_from.distillkit import load_compression, read_distillkit
from logitcask.pipeline.labels_from.fit import OFFSETS, Evidence, Fit
from logitcask.pipeline.labels_from.openai import ReadReplies
from logitcask.pipeline.labels_from.rows import LabelledText, Read
from logitcask.pipeline.labels_from.staged import StagedLabels
from logitcask.pipeline.labels_from.topk import read_axolotl, read_topk
from logitcask.pipeline.precompute.sharding import cut_shards, explain_limits, plan_strides, shuffled
from logitcask.pipeline.settings.cache import ImportSettings
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.records import Raw, read_records
from logitcask.pipeline.text.token_table import TokenTable, write_table
from logitcask.pipeline.text.tokenizer import identify, load_tokenizer, tokenizer_files, tokenizer_size
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.text.tokens.log import TokenLog
from logitcask.pipeline.text.tokens.stage import pack

TRIED = 20_000  # rows from which it is decided how a source is read
SHARD_ENTRIES = 1 << 22  # label entries per shard, the unit of resuming
SHARD_POSITIONS = 65536
ENDLESS = 2**31  # tokens per example: nothing is truncated
SEED = 0  # of the order


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    manifest: Manifest
    shards_written: int
    positions_left_out: int  # those with fewer entries than --head-size
    fewest: int  # entries of a position
    most: int


def import_labels(settings: ImportSettings, *, judged: bool = True) -> ImportReport:
    """Make a cache of a source's labels, or finish one. Raises LogitcaskError for any error that the user can fix.

    ``judged``: whether the text must be as probable as the labels say.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    vocab_size = tokenizer_size(tokenizer)
    read = _reader(settings, tokenizer)
    fit = _decide(settings, read, vocab_size, judged)
    with sole_writer(settings.output, None, say) as staging:
        stored = stored_manifest(settings.output, overwrite=settings.overwrite)
        labels = StagedLabels(staging, fit, vocab_size, settings.head_size)
        table = _stage(settings, read, labels, staging, fit, vocab_size, judged)
        weights = labels.finish()
        order = shuffled(len(table), SEED)
        head_size = settings.head_size or labels.fewest
        shard_examples = cut_shards(
            table.positions[order].astype(np.int64), min(SHARD_POSITIONS, max(1, SHARD_ENTRIES // head_size))
        )
        files = tokenizer_files(tokenizer)
        unknown = [*(() if fit.rest_is_known else ("rest",)), *(("gold",) if labels.without_gold else ())]
        with explain_limits():
            manifest = Manifest.model_validate(
                {
                    "format_version": FORMAT_VERSION,
                    "teacher": _teacher(settings, weights),
                    "tokenizer": identify(tokenizer, files),
                    "data": _data(table),
                    "label": LabelSettings(
                        vocab_size=vocab_size,
                        head_size=head_size,
                        tail_draws=0,
                        temperatures=[1.0],
                        seed=SEED,
                        unknown=unknown or None,
                    ),
                    "shards": plan_strides(
                        shard_examples, np.diff(table.starts)[order], table.positions[order].astype(np.int64)
                    ),
                }
            )
        if stored and not settings.overwrite:
            require_same(settings.output, stored, dict(manifest))
        writer = create_cache(settings.output, manifest, shard_examples, files, overwrite=settings.overwrite)
        missing = writer.missing_shards()
        _write(settings, writer, missing, labels, table, order, shard_examples, head_size)
    return ImportReport(writer.manifest, len(missing), labels.left_out, labels.fewest, labels.most)


def _reader(settings: ImportSettings, tokenizer: PreTrainedTokenizerBase) -> Read:
    """Return the function that reads a record of the source's format."""
    if settings.format == "topk":
        return read_topk
    if settings.format == "axolotl":
        return lambda record: read_axolotl(record, tokenizer)
    if settings.format == "openai":
        return ReadReplies(tokenizer)
    compression = load_compression(settings.source, settings.compression_config)
    return lambda record: read_distillkit(record, compression, tokenizer)


def _texts(
    settings: ImportSettings, records: Iterable[Raw], read: Read, bad: BadRecords
) -> Iterator[tuple[str, dict[str, Any], LabelledText]]:
    """Yield each text with the place of its record and the record, whose columns have our names; collect bad ones."""
    for where, raw in records:
        bad.read += 1
        record: dict[str, Any] = {}
        try:
            if isinstance(raw, RecordError):
                raise raw
            record = {settings.renamed.get(name, name): value for name, value in raw.items()}
            for text in read(record):
                yield where, record, text
        except RecordError as error:
            bad.add(where, str(error), sorted(record))


def _decide(settings: ImportSettings, read: Read, vocab_size: int, judged: bool) -> Fit:
    """Return how the source is to be read, from its first rows. Raises LogitcaskError if these do not fit its text."""
    evidence, ignored = Evidence(judged), BadRecords(None, 1.0)
    for _, _, text in _texts(settings, read_records([settings.source]), read, ignored):
        evidence.add(text, vocab_size)
        if evidence.rows >= TRIED:
            break
    if not evidence.rows and ignored.count:
        with BadRecords(None) as bad:
            for _ in _texts(settings, read_records([settings.source]), read, bad):
                pass
    inferred = settings.format in ("axolotl", "topk")
    return evidence.settle(settings.source, OFFSETS[:2] if inferred else OFFSETS[:1])


def _stage(
    settings: ImportSettings,
    read: Read,
    labels: StagedLabels,
    folder: Path,
    fit: Fit,
    vocab_size: int,
    judged: bool,
) -> TokenTable:
    """Stage labels and tokens of the whole source. Raises LogitcaskError if they do not fit each other."""
    evidence = Evidence(judged)
    bad = BadRecords(None, settings.bad_share)

    def encoded() -> Iterator[Encoded]:
        with bad, track(f"reading {settings.source}", None, "examples") as advance:
            for where, record, text in _texts(settings, read_records([settings.source]), read, bad):
                try:
                    ids = text.input_ids
                    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                        raise RecordError(f"input_ids must be from 0 to {vocab_size - 1}, --tokenizer's last token")
                    example = labels.add(text)
                except RecordError as error:
                    bad.add(where, str(error), sorted(record))
                    continue
                evidence.add(text, vocab_size)
                yield example
                advance(1)
        if not len(labels):
            raise LogitcaskError(
                f"{settings.source}: no position of it has a label"
                + (f" of {settings.head_size} entries: lower --head-size" if settings.head_size else "")
            )

    with TokenLog(folder) as log:
        packed = (pack([example], ENDLESS) for example in encoded())
        table = write_table(packed, log, max_seq_length=ENDLESS, prompt_loss=False, source=settings.source)
    evidence.require(settings.source, fit)
    return table


def _teacher(settings: ImportSettings, weights: str) -> TeacherIdentity:
    """Return what is known of the teacher: where its labels came from. The labels stand for its weights."""
    name = settings.source if not Path(settings.source).exists() else Path(settings.source).resolve().name
    return TeacherIdentity(
        id=name[-1024:], revision="", weights=weights, dtype="unknown", engine=f"import {settings.format}"
    )


def _data(table: TokenTable) -> DataIdentity:
    """Return the data's identity; ``prompt_loss`` says whether every token that can be a target is one."""
    data = table.identity
    every = data.positions == data.tokens - data.examples
    return data.model_copy(update={"max_seq_length": data.longest, "prompt_loss": every})


def _write(
    settings: ImportSettings,
    writer: CacheWriter,
    missing: list[int],
    labels: StagedLabels,
    table: TokenTable,
    order: Any,
    shard_examples: Any,
    head_size: int,
) -> None:
    """Write the missing shards."""
    made_by = MadeBy(engine=f"import {settings.format}", device="", versions={"logitcask": version("logitcask")})
    writer = CacheWriter(settings.output, writer.manifest, made_by=made_by)
    starts = np.concatenate([[0], np.cumsum(shard_examples)])
    with track("writing", len(missing), "shards") as advance:
        for shard in missing:
            rows = order[starts[shard] : starts[shard + 1]].tolist()
            examples = [table.example(row) for row in rows]
            targets = [labels.targets(row, head_size) for row in rows]
            parts = zip(examples, targets, strict=True)
            writer.write_shard(shard, Shard.of([Example(e.input_ids, e.target_mask, t) for e, t in parts]))
            advance(1)
