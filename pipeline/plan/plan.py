"""Estimate what a run will cost: bytes of the cache, hours of the teacher, memory of both stages."""

import math
from collections.abc import Iterator
from pathlib import Path

from numcodecs import Zstd
from pydantic import BaseModel
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.integrity import CONSTANT_LEVEL
from logitcask.cache.report.info import LABEL_PARTS
from logitcask.cache.storage.staging import scratch_folder
from logitcask.pipeline.batches.collate import places_at_once
from logitcask.pipeline.console import counted, results
from logitcask.pipeline.models.shapes import (
    Amount,
    ModelShape,
    is_size,
    shape_of_size,
    shape_of_student,
    shape_of_teacher,
    student_memory,
    usual_length,
)
from logitcask.pipeline.plan.estimates import (
    CPU,
    TOKENIZER_BYTES,
    Device,
    Preset,
    cache_bytes,
    find_device,
    teacher_memory,
    teacher_seconds,
    where_sparse_is_better,
)
from logitcask.pipeline.plan.tables import Tables, make_tables, render_tables
from logitcask.pipeline.settings.base import shipped_configs
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.records import Raw
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_files, tokenizer_size
from logitcask.pipeline.text.tokens.stage import stage_tokens

SAMPLE_BYTES = 8_000_000  # of a data file, tokenized at most: a few seconds
DEFAULT_BITS: int = PrecomputeSettings.model_fields["hidden_bits"].default
SHARD_POSITIONS: int = PrecomputeSettings.model_fields["shard_positions"].default


class Plan(BaseModel):
    """The figures of a plan. Memory is in bytes, by use; ``cost`` is that of stage 1."""

    examples: int
    tokens: int
    positions: int
    shards: int
    cache_bytes: int
    cache_bytes_by_part: dict[str, int]
    teacher_parameters: int
    teacher_tokens_per_second: float
    teacher_hours: float
    cost: float | None
    teacher_memory: dict[str, int]
    teacher_fits: bool
    student_parameters: int
    student_memory: dict[str, int]
    student_fits: bool
    device: str
    assumed: list[str]


def print_plan(settings: PlanSettings) -> None:
    """Print a plan, or the tables of common models. Raises LogitcaskError for any error that the user can fix."""
    report = make_tables() if settings.tables else make_plan(settings)
    if settings.json_:
        print(report.model_dump_json(indent=2))
        return
    console = results()
    for table in render_tables(report) if isinstance(report, Tables) else [render_plan(report)]:
        console.print(table)
    for line in report.assumed if isinstance(report, Plan) else []:
        console.print(f"- {line}", markup=False, highlight=False)


def make_plan(settings: PlanSettings) -> Plan:
    """Return the figures of a run. Raises LogitcaskError if the data, a model or the device cannot be found."""
    device = find_device(settings.device)
    source = settings.teacher_model or ""
    sized = is_size(source)
    teacher = shape_of_size(source) if sized else shape_of_teacher(source)
    tokenizer = None if sized else load_tokenizer(source)
    if not sized and "max_seq_length" not in settings.model_fields_set:
        settings = settings.model_copy(update={"max_seq_length": usual_length(source)})
    if tokenizer is not None:
        set_template(tokenizer, settings.chat_template, settings.chat_template_kwargs)
    amount, assumed = _amount_of_text(settings, tokenizer)
    vocabulary = tokenizer_size(tokenizer) if tokenizer else teacher.vocabulary
    student = _student(settings.student_config, vocabulary)
    shards, parts = plan_cache(settings.preset, amount, vocabulary, tokenizer, width=teacher.hidden)
    batch_tokens = settings.batch_size * settings.max_seq_length
    seconds = teacher_seconds(teacher, device, amount, batch_tokens)
    if settings.teacher_tokens_per_second is not None:
        seconds = amount.tokens / settings.teacher_tokens_per_second
    teacher_bytes = teacher_memory(teacher, batch_tokens, device.weight_bytes)
    student_bytes = student_memory(
        student,
        places_at_once(settings.batch_size, settings.max_seq_length) if device == CPU else batch_tokens,
        checkpointing=settings.use_gradient_checkpointing,
        mixed=settings.use_mixed_precision,
        on_cpu=device == CPU,
    )
    return Plan(
        examples=amount.examples,
        tokens=amount.tokens,
        positions=amount.positions,
        shards=shards,
        cache_bytes=round(sum(parts.values())),
        cache_bytes_by_part=_rounded(parts),
        teacher_parameters=teacher.parameters,
        teacher_tokens_per_second=amount.tokens / seconds,
        teacher_hours=seconds / 3600,
        cost=None if settings.price is None else settings.price * seconds / 3600,
        teacher_memory=_rounded(teacher_bytes),
        teacher_fits=device.holds(sum(teacher_bytes.values())),
        student_parameters=student.parameters,
        student_memory=_rounded(student_bytes),
        student_fits=device.holds(sum(student_bytes.values())),
        device=device.name,
        assumed=[*assumed, *_assumptions(settings, device, sized), *_of_exact(settings.preset, teacher.hidden)],
    )


def plan_cache(
    preset: Preset,
    amount: Amount,
    vocabulary: int,
    tokenizer: PreTrainedTokenizerBase | None,
    shards: int | None = None,
    *,
    width: int = 0,
    bits: int = DEFAULT_BITS,
) -> tuple[int, dict[str, float]]:
    """Return the number of shards of a cache, and its bytes: by array, of its metadata, and of the tokenizer."""
    shards, tokenizer_bytes = shards or math.ceil(amount.positions / SHARD_POSITIONS), TOKENIZER_BYTES * vocabulary
    if tokenizer is not None:
        tokenizer_bytes = sum(
            len(Zstd(level=CONSTANT_LEVEL).encode(data)) for data in tokenizer_files(tokenizer).values()
        )
    return shards, {
        **cache_bytes(preset, vocabulary, amount, shards, width=width, bits=bits),
        "tokenizer": tokenizer_bytes,
    }


def _student(source: str, vocabulary: int) -> ModelShape:
    sized = is_size(source) and source not in shipped_configs("students")  # 350m is a file, 350M a size
    return shape_of_size(source) if sized else shape_of_student(Path(source), vocabulary)


def _amount_of_text(settings: PlanSettings, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Amount, list[str]]:
    """Return how much text there is, and what that assumes."""
    if settings.tokens is not None:
        examples = math.ceil(settings.tokens / settings.max_seq_length)
        assumption = f"every token is a target, every example {settings.max_seq_length:,} tokens long"
        return Amount(examples, settings.tokens, settings.tokens), [assumption]
    assert settings.train_data is not None
    if tokenizer is None:
        raise LogitcaskError(
            f"--train-data needs a tokenizer, got --teacher-model {settings.teacher_model!r}, which is only a size: "
            "give a model, or --tokens in place of --train-data"
        )
    encoder = Encoder(tokenizer, prompt_loss=settings.prompt_loss, turns=settings.chat_turns, columns=settings.renamed)
    reading = Reading(settings.train_data, **settings.taken)
    return count_data(reading, encoder, settings.max_seq_length, settings.bad_share)


def count_data(
    reading: Reading, encoder: Encoder, max_seq_length: int, bad_share: float = 0.0
) -> tuple[Amount, list[str]]:
    """Return examples, tokens and target positions after truncation, and what they assume.

    They equal those of stage 1, except that of files above ``SAMPLE_BYTES`` only every n-th example is tokenized.
    """
    size = sum(Path(source).stat().st_size for source in reading.sources if Path(source).is_file())
    every, read, named = max(1, math.ceil(size / SAMPLE_BYTES)), 0, ", ".join(reading.sources)

    def sample(source: str) -> Iterator[Raw]:
        nonlocal read
        for where, record in reading(source):
            if read % every == 0:
                yield where, record
            read += 1

    with scratch_folder() as folder:
        identity = stage_tokens(
            encoder,
            reading.sources,
            folder,
            bad=BadRecords(None, bad_share),
            max_seq_length=max_seq_length,
            records=sample,
        ).identity
    scale = read / math.ceil(read / every)
    amount = Amount(*(round(count * scale) for count in (identity.examples, identity.tokens, identity.positions)))
    return amount, [f"one in {every} of the {read:,} examples of {named} was tokenized"] if every > 1 else []


def _assumptions(settings: PlanSettings, device: Device, sized: bool) -> list[str]:
    lines = ["text compresses like the code and English on which label sizes were measured"]
    if sized or is_size(settings.student_config):
        lines.append("a model given only by its size has the shape of the nearest known model")
    if settings.teacher_tokens_per_second is not None:
        lines.append("stage 1 is as fast as --teacher-tokens-per-second says")
    elif device is CPU:
        lines.append("stage 1 is as fast as on the two cores where it was measured")
    else:
        share = f"stage 1 reaches {device.utilisation:.0%} of the {device.tflops:g} TFLOP/s of {device.name}"
        lines.append(f"{share}, not measured: override the speed with --teacher-tokens-per-second")
    return lines


def _of_exact(preset: Preset, width: int) -> list[str]:
    return where_sparse_is_better(width, DEFAULT_BITS) if preset == "exact" else []


def _rounded(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items()}


def render_plan(plan: Plan) -> Table:
    """Return a plan as a table of two columns."""
    table = Table("", "", show_header=False)
    table.add_row("data", f"{plan.examples:,} examples, {plan.tokens:,} tokens, {plan.positions:,} target positions")
    rate = f"{plan.cache_bytes / plan.positions:.1f} bytes per target position"
    kinds = {"labels": 0, "text": 0, "metadata": 0, "tokenizer": 0}
    kinds |= {name: 0 for name in plan.cache_bytes_by_part if name == "teacher_head"}
    for name, size in plan.cache_bytes_by_part.items():
        label = name.startswith(LABEL_PARTS)
        kinds[name if name in kinds else "labels" if label else "text"] += size
    table.add_row("cache", f"{size_text(plan.cache_bytes)} in {counted(plan.shards, 'shard')}, {rate}\n{_parts(kinds)}")
    hours = plan.teacher_hours
    time = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    speed = f"{time} at {plan.teacher_tokens_per_second:,.0f} tokens/s on {plan.device}"
    table.add_row("stage 1, time", speed)
    if plan.cost is not None:
        table.add_row("stage 1, cost", f"{plan.cost:,.2f}")
    for stage, parts, fits, count in (
        ("stage 1, memory", plan.teacher_memory, plan.teacher_fits, plan.teacher_parameters),
        ("stage 2, memory", plan.student_memory, plan.student_fits, plan.student_parameters),
    ):
        verdict = f"{'fits' if fits else 'does not fit'} {plan.device}"
        table.add_row(stage, f"{size_text(sum(parts.values()))}, {verdict}; {count:,} parameters\n{_parts(parts)}")
    return table


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())


def size_text(size: float) -> str:
    """Format bytes in a fitting decimal unit."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.2f} {unit}"
    return f"{size:.0f} bytes"
