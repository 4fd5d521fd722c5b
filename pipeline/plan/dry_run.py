"""precompute-logits --dry-run: what stage 1 would do with these options, without the teacher's weights."""

import tempfile
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from rich.table import Table

from logitcask.cache.fidelity import row_width
from logitcask.cache.report.info import LABEL_PARTS
from logitcask.pipeline.console import results
from logitcask.pipeline.models.shapes import shape_of_teacher
from logitcask.pipeline.models.student_memory import Amount
from logitcask.pipeline.plan.estimates import CPU, GPUS, TEMPERATURES, Preset, teacher_memory, teacher_seconds
from logitcask.pipeline.plan.plan import plan_cache, size_text
from logitcask.pipeline.precompute.sharding import cut_shards, shuffled
from logitcask.pipeline.settings.precompute import PRESETS, PrecomputeSettings
from logitcask.pipeline.text.examples import Encoder, encode_source
from logitcask.pipeline.text.token_table import stage_tokens
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size

SHARES = (0, 50, 90, 99, 100)  # of the examples, in percent


class DryRun(BaseModel):
    """Exact counts of the data as stage 1 will cut it; estimates of bytes and hours."""

    examples: int
    tokens: int
    positions: int
    truncated: int
    dropped: int
    lengths: dict[int, int]  # percent of examples: tokens that they have at most
    shards: int
    cache_bytes: dict[str, float]  # by part
    hours: dict[str, float]  # by device that holds the teacher
    assumed: list[str]


def dry_run(settings: PrecomputeSettings) -> DryRun:
    """Tokenize the data and reckon the rest. Raises LogitcaskError where data, tokenizer or config cannot be had."""
    teacher = shape_of_teacher(settings.teacher_model, settings.teacher_revision)
    tokenizer = load_tokenizer(
        settings.teacher_model, revision=settings.teacher_revision, trust_remote_code=settings.trust_remote_code
    )
    with tempfile.TemporaryDirectory(prefix="logitcask-") as folder:
        table = stage_tokens(
            encode_source(Encoder(tokenizer, prompt_loss=settings.prompt_loss), settings.train_data),
            Path(folder),
            max_seq_length=settings.max_seq_length,
            prompt_loss=settings.prompt_loss,
            source=settings.train_data,
        )
    data, lengths = table.identity, np.diff(table.starts)
    positions = table.positions[shuffled(len(table), settings.seed)].astype(np.int64)
    shards = len(cut_shards(positions, settings.shard_positions))
    amount = Amount(data.examples, data.tokens, data.positions)
    preset, told = _nearest(settings)
    _, parts = plan_cache(preset, amount, tokenizer_size(tokenizer), tokenizer, shards)
    batch_tokens = settings.batch_size * settings.max_seq_length
    devices = [
        device
        for device in (*GPUS, CPU)
        if device.holds(sum(teacher_memory(teacher, batch_tokens, device.weight_bytes).values()))
    ]
    return DryRun(
        **{name: getattr(data, name) for name in ("examples", "tokens", "positions", "truncated", "dropped")},
        lengths={share: int(np.percentile(lengths, share, method="inverted_cdf")) for share in SHARES},
        shards=shards,
        cache_bytes=_scaled(parts, preset, settings, shards),
        hours={device.name: teacher_seconds(teacher, device, amount, batch_tokens) / 3600 for device in devices},
        assumed=[
            *told,
            "text compresses like the code and English that the sizes of labels were measured on",
            "a GPU reaches 40% of its peak, not measured; 2-core-CPU is the machine of tests.benchmarks.capture",
            *(["all parts of --shards together"] if settings.part else []),
        ],
    )


def _nearest(settings: PrecomputeSettings) -> tuple[Preset, list[str]]:
    """The preset whose measured sizes are nearest, and what that assumes."""
    asked = settings.head_size, settings.tail_draws
    presets: tuple[Preset, ...] = ("lean", "standard", "rich")
    nearest = min(presets, key=lambda name: abs(sum(PRESETS[name]) - sum(asked)))
    if PRESETS[nearest] == asked and len(settings.temperatures) == TEMPERATURES:
        return nearest, []
    return nearest, [
        f"labels cost in proportion to those of preset {nearest}, measured with {TEMPERATURES} temperatures"
    ]


def _scaled(parts: dict[str, float], preset: Preset, settings: PrecomputeSettings, shards: int) -> dict[str, float]:
    """Bytes of a preset's cache as they would be with the settings' entries, temperatures and certificate."""
    head, draws = PRESETS[preset]
    count = len(settings.temperatures)
    factors = {"head": settings.head_size / head, "tail": settings.tail_draws / draws, "log": count / TEMPERATURES}
    found = {name: size * factors.get(name.split("_")[0], 1.0) for name, size in parts.items()}
    return {**found, "fidelity": 4.0 * row_width(count) * shards if settings.fidelity_positions else 0.0}


def print_dry_run(settings: PrecomputeSettings) -> None:
    """Print what stage 1 would do. Raises LogitcaskError for anything the user can mend."""
    found = dry_run(settings)
    if settings.json_:
        print(found.model_dump_json(indent=2))
        return
    size = sum(found.cache_bytes.values())
    labels = sum(value for name, value in found.cache_bytes.items() if name.startswith(LABEL_PARTS))
    console = results()
    table = Table(show_header=False)
    table.add_row("data", f"{found.examples:,} examples, {found.tokens:,} tokens, {found.positions:,} target positions")
    table.add_row("tokens an example", ", ".join(f"{share}%: {length:,}" for share, length in found.lengths.items()))
    table.add_row(
        "cut", f"{found.truncated:,} examples at {settings.max_seq_length:,} tokens, {found.dropped:,} dropped"
    )
    table.add_row(
        "cache",
        f"{size_text(size)} in {found.shards:,} shards, {size / found.positions:.1f} bytes a target position; "
        f"labels {size_text(labels)}",
    )
    table.add_row(
        "hours", ", ".join(f"{name} {hours:,.2g}" for name, hours in found.hours.items()) or "no device holds it"
    )
    console.print(table)
    for line in found.assumed:
        console.print(f"- {line}", markup=False, highlight=False)
    console.print(f"nothing was written to {settings.output}", markup=False, highlight=False)
