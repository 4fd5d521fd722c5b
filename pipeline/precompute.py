"""Stage 1: label every example once with the teacher and write the cache, shard by shard."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from cache.create import check_output, create_cache
from cache.errors import LogitcaskError
from cache.fidelity import row_width
from cache.lock import sole_writer
from cache.manifest import FORMAT_VERSION, LabelSettings, Manifest
from cache.shard import Example, Shard
from cache.writer import CacheWriter
from pipeline.examples import Encoder, encode_source
from pipeline.progress import track
from pipeline.settings import PrecomputeSettings
from pipeline.shards import Work, cut_shards, plan_strides, shards_of, shuffled
from pipeline.teachers.base import Teacher
from pipeline.teachers.load import check_engine, load_engine
from pipeline.token_table import stage_tokens
from pipeline.tokenizer import identify, load_tokenizer, tokenizer_files, tokenizer_size

ENGINE_BATCHES = 64  # batches given to vLLM at once, which schedules them itself


@dataclass(frozen=True)
class PrecomputeReport:
    """What a run of stage 1 did."""

    manifest: Manifest
    shards_written: int
    shards_found: int


def precompute(settings: PrecomputeSettings) -> PrecomputeReport:
    """Make the cache, or finish an interrupted one. Raises LogitcaskError for anything the user can mend."""
    tokenizer = load_tokenizer(
        settings.teacher_model, revision=settings.teacher_revision, trust_remote_code=settings.trust_remote_code
    )
    size = tokenizer_size(tokenizer)
    if settings.head_size + settings.tail_draws > size:
        asked = settings.head_size + settings.tail_draws
        raise LogitcaskError(f"--head-size + --tail-draws is {asked}, more than the vocabulary's {size} tokens")
    with sole_writer(settings.output, settings.part) as staging:
        encoder = Encoder(tokenizer, prompt_loss=settings.prompt_loss)
        table = stage_tokens(
            encode_source(encoder, settings.train_data),
            staging,
            max_seq_length=settings.max_seq_length,
            prompt_loss=settings.prompt_loss,
            source=settings.train_data,
        )
        order = shuffled(len(table), settings.seed)
        positions = table.positions[order].astype(np.int64)
        shard_examples = cut_shards(positions, settings.shard_positions)
        files = tokenizer_files(tokenizer)
        label = LabelSettings(
            vocab_size=size,
            head_size=settings.head_size,
            tail_draws=settings.tail_draws,
            temperatures=list(settings.temperatures),
            seed=settings.seed,
            fidelity_positions=settings.fidelity_positions,
        )
        with explain_limits():
            parts = {
                "format_version": FORMAT_VERSION,
                "tokenizer": identify(tokenizer, files),
                "data": table.identity,
                "label": label,
                "shards": plan_strides(shard_examples, np.diff(table.starts)[order], positions),
            }
        alone = settings.part is None
        # before a large teacher is loaded in vain
        check_output(settings.output, parts, overwrite=settings.overwrite, alone=alone)
        teacher = load_engine(settings)
        check_teacher(teacher, size, settings.max_seq_length)
        with explain_limits():
            manifest = Manifest.model_validate({**parts, "teacher": teacher.identity})
        mine = shards_of(settings.part or (1, 1), manifest.shards.count)
        writer = create_cache(
            settings.output,
            manifest,
            shard_examples,
            files,
            overwrite=settings.overwrite,
            shards=None if alone else mine,
        )
        missing = writer.missing_shards()
        at_once = ENGINE_BATCHES if teacher.identity.engine.startswith("vllm") else 1
        batch_tokens = settings.batch_size * settings.max_seq_length * at_once
        work = Work(table, order, shard_examples, batch_tokens, label)
        if missing and teacher.identity.engine == "vllm" and not settings.skip_engine_check:
            check_engine(teacher, settings, work.batches(missing[0])[-1], label)
        label_shards(teacher, work, missing, writer)
    return PrecomputeReport(manifest, len(missing), len(mine) - len(missing))


@contextlib.contextmanager
def explain_limits() -> Iterator[None]:
    """Tell in one line that a cache of such shards would be refused by its readers."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LogitcaskError(
            f"no reader would take this cache: {place} {first['msg']}: lower --shard-positions"
        ) from error


def label_shards(teacher: Teacher, work: Work, shards: Sequence[int], writer: CacheWriter) -> None:
    """Label and write shards, each whole before the next."""
    with track("labelling", sum(map(work.positions, shards)), "positions") as advance:
        for index in shards:
            labelled: dict[int, Example] = {}
            fidelity = np.zeros(row_width(len(work.label.temperatures)))
            for batch in work.batches(index):
                found = teacher.label(batch, work.label)
                fidelity += found.fidelity
                for example, targets in zip(batch, found.targets, strict=True):
                    labelled[example.index] = Example(example.input_ids, example.target_mask, targets)
                    advance(len(targets))
            writer.write_shard(index, Shard.of([labelled[place] for place in work.places(index)], fidelity))


def check_teacher(teacher: Teacher, vocabulary: int, max_seq_length: int) -> None:
    """Raise LogitcaskError where the teacher does not fit its tokenizer or the lengths asked for."""
    if vocabulary > teacher.logits_width:
        raise LogitcaskError(
            f"the tokenizer has {vocabulary} tokens, its head {teacher.logits_width} rows: they do not fit"
        )
    if teacher.max_length is not None and max_seq_length > teacher.max_length:
        raise LogitcaskError(
            f"--max-seq-length {max_seq_length} is more than the teacher's {teacher.max_length}: lower it"
        )
