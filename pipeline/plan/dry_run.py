"""precompute-logits --dry-run: report what stage 1 would do with these options, without the teacher's weights."""

import numpy as np
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from logitcask.cache.fidelity import row_width
from logitcask.cache.report.info import LABEL_PARTS
from logitcask.cache.storage.staging import scratch_folder
from logitcask.pipeline.console import counted, duration, results
from logitcask.pipeline.models.shapes import Amount, shape_of_teacher
from logitcask.pipeline.plan.estimates import (
    CPU,
    GPUS,
    TEMPERATURES,
    Preset,
    teacher_memory,
    teacher_seconds,
    where_sparse_is_better,
)
from logitcask.pipeline.plan.plan import plan_cache, size_text
from logitcask.pipeline.plan.show import ShownExample, first_examples, print_examples
from logitcask.pipeline.precompute.length import with_length
from logitcask.pipeline.precompute.sharding import cut_shards, shuffled
from logitcask.pipeline.precompute.vocabularies import load_tokenizers, make_encoder
from logitcask.pipeline.settings.precompute import PRESETS, PrecomputeSettings
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.token_table import TokenTable
from logitcask.pipeline.text.tokenizer import tokenizer_size
from logitcask.pipeline.text.tokens.stage import stage_tokens
from logitcask.pipeline.text.tokens.workers import processes

PERCENTILES = (0, 50, 90, 99, 100)  # of the lengths of examples


class DryRun(BaseModel):
    """Exact counts of the data as stage 1 will cut it; estimates of bytes and hours."""

    records: dict[str, int]  # by shape, those that can be used
    made: dict[str, int]  # examples by shape of their record
    bad: dict[str, int]  # records by reason, those that cannot be used
    examples: int
    tokens: int
    positions: int
    truncated: int
    dropped: int
    lengths: dict[int, int]  # by percentile, in tokens
    shards: int
    cache_bytes: dict[str, float]  # by part
    hours: dict[str, float]  # by device, for those that hold the teacher
    assumed: list[str]
    shown: list[ShownExample]


def dry_run(settings: PrecomputeSettings, bad: BadRecords | None = None) -> DryRun:
    """Tokenize the data and estimate the rest; the bad records go to ``bad``, if given.

    Raises LogitcaskError if the data, the tokenizer or the config cannot be loaded, or no record can be used.
    """
    bad = bad or BadRecords(None, settings.bad_share)
    teacher = shape_of_teacher(settings.tokenizer_source, settings.teacher_revision)
    settings = with_length(settings)
    tokenizers = load_tokenizers(settings)
    tokenizer, encoder = tokenizers.cache, make_encoder(settings, tokenizers)
    reading = Reading(settings.train_data, **settings.taken)
    table = _tokenize(settings, encoder, reading, bad)
    data, lengths = table.identity, np.diff(table.starts)
    positions = table.positions[shuffled(len(table), settings.seed)].astype(np.int64)
    shards = len(cut_shards(positions, settings.shard_positions))
    amount = Amount(data.examples, data.tokens, data.positions)
    preset, scaling = _nearest_preset(settings, teacher.hidden)
    size = tokenizer_size(tokenizer)
    _, parts = plan_cache(preset, amount, size, tokenizer, shards, width=teacher.hidden, bits=settings.hidden_bits)
    batch_tokens = settings.batch_size * settings.max_seq_length
    devices = [
        device
        for device in (*GPUS, CPU)
        if device.holds(sum(teacher_memory(teacher, batch_tokens, device.weight_bytes).values()))
    ]
    return DryRun(
        records=dict(encoder.notices.records),
        made=dict(encoder.notices.examples),
        bad=bad.by_reason(),
        **{name: getattr(data, name) for name in ("examples", "tokens", "positions", "truncated", "dropped")},
        lengths={q: int(np.percentile(lengths, q, method="inverted_cdf")) for q in PERCENTILES},
        shards=shards,
        cache_bytes=_scaled_bytes(parts, preset, settings, shards),
        hours={device.name: teacher_seconds(teacher, device, amount, batch_tokens) / 3600 for device in devices},
        assumed=[
            *scaling,
            "text compresses like the code and English on which label sizes were measured",
            "a GPU reaches 40% of its peak, not measured; 2-core-CPU is the machine of tests.benchmarks.capture",
            *(["all parts of --shards are counted together"] if settings.part else []),
        ],
        shown=first_examples(
            encoder.silent(), tokenizer, settings.train_data, reading, settings.show, settings.max_seq_length
        ),
    )


def _tokenize(settings: PrecomputeSettings, encoder: Encoder, reading: Reading, bad: BadRecords) -> TokenTable:
    with scratch_folder() as folder:
        return stage_tokens(
            encoder,
            settings.train_data,
            folder,
            bad=bad,
            max_seq_length=settings.max_seq_length,
            records=reading,
            workers=processes(settings.tokenize_workers),
        )


def _nearest_preset(settings: PrecomputeSettings, width: int) -> tuple[Preset, list[str]]:
    """Return the preset with the nearest label size, and the assumption that makes, if any."""
    wanted = settings.head_size, settings.tail_draws
    if settings.preset == "exact":
        return "exact", where_sparse_is_better(width, settings.hidden_bits)
    presets: tuple[Preset, ...] = ("lean", "standard", "rich")
    nearest = min(presets, key=lambda name: abs(sum(PRESETS[name]) - sum(wanted)))
    if PRESETS[nearest] == wanted and len(settings.temperatures) == TEMPERATURES:
        return nearest, []
    return nearest, [
        f"labels take bytes in proportion to those of preset {nearest}, measured with {TEMPERATURES} temperatures"
    ]


def _scaled_bytes(
    parts: dict[str, float], preset: Preset, settings: PrecomputeSettings, shards: int
) -> dict[str, float]:
    """Scale the bytes of a preset's cache to the settings' label size, temperatures and certificate."""
    head, draws = PRESETS[preset]
    count = len(settings.temperatures)
    factors = {
        "head": settings.head_size / head,
        "tail": settings.tail_draws / max(1, draws),
        "log": count / TEMPERATURES,
    }
    scaled = {name: size * factors.get(name.split("_")[0], 1.0) for name, size in parts.items()}
    return {**scaled, "fidelity": 4.0 * row_width(count) * shards if settings.fidelity_positions else 0.0}


def print_dry_run(settings: PrecomputeSettings) -> None:
    """Print what stage 1 would do. Raises LogitcaskError for any error that the user can fix."""
    settings = with_length(settings)
    bad = BadRecords(None, settings.bad_share, decides=False)
    report = dry_run(settings, bad)
    if settings.json_:
        print(report.model_dump_json(indent=2))
    else:
        _print_report(report, settings)
    bad.settle()


def _print_report(report: DryRun, settings: PrecomputeSettings) -> None:
    size = sum(report.cache_bytes.values())
    labels = sum(value for name, value in report.cache_bytes.items() if name.startswith(LABEL_PARTS))
    console = results()
    table = Table(show_header=False)
    table.add_row(
        "data", f"{report.examples:,} examples, {report.tokens:,} tokens, {report.positions:,} target positions"
    )
    table.add_row("records", "\n".join(_shape_lines(report)))
    if report.bad:
        table.add_row("bad records", Text("\n".join(f"{count:,} {reason}" for reason, count in report.bad.items())))
    table.add_row("tokens per example", ", ".join(f"{q}%: {length:,}" for q, length in report.lengths.items()))
    table.add_row(
        "truncated",
        f"{report.truncated:,} examples at {settings.max_seq_length:,} tokens, {report.dropped:,} dropped",
    )
    table.add_row(
        "cache",
        f"{size_text(size)} in {counted(report.shards, 'shard')}, {size / report.positions:.1f} bytes per target "
        f"position; labels {size_text(labels)}",
    )
    table.add_row(
        "time",
        ", ".join(f"{name} {duration(3600 * hours)}" for name, hours in report.hours.items()) or "no device holds it",
    )
    console.print(table)
    for line in report.assumed:
        console.print(f"- {line}", markup=False, highlight=False)
    print_examples(console, report.shown)
    console.print(f"nothing was written to {settings.output}", markup=False, highlight=False)


def _shape_lines(report: DryRun) -> list[str]:
    """Return a line for each shape of records, with the number of examples if a record made several."""
    return [
        f"{count:,} {shape}" + (f": {report.made[shape]:,} examples" if report.made[shape] != count else "")
        for shape, count in report.records.items()
    ]
