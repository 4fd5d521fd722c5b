"""Stage 1: label every example once with the teacher and write the cache, shard by shard.

A cache that is there already is resumed with its own manifest: its date, its dtype and engine where the options leave
these open. What must be equal is what ``cache.manifest.identity`` returns.
"""

import contextlib
import datetime
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import CacheFormatError, CacheMismatchError, LogitcaskError
from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.integrity import committed_shards
from logitcask.cache.manifest import EXACT_VERSION, FORMAT_VERSION, ExactCode, LabelSettings, Manifest
from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.open import open_store
from logitcask.cache.storage.ownership import explain_write_errors, sole_writer, watch_folder
from logitcask.cache.writer import create_cache, require_same, stored_manifest
from logitcask.pipeline.console import say, track
from logitcask.pipeline.machine import explain_out_of_memory
from logitcask.pipeline.precompute.length import with_length
from logitcask.pipeline.precompute.local import LocalExecutor
from logitcask.pipeline.precompute.ray import RayExecutor, disconnect, tasks
from logitcask.pipeline.precompute.report import PrecomputeReport, data_line, shard_place, teacher_line
from logitcask.pipeline.precompute.sharding import Work, cut_shards, explain_limits, plan_strides, shards_of, shuffled
from logitcask.pipeline.precompute.vocabularies import Tokenizers, load_tokenizers, make_encoder
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.load import TeacherSpec, choose_engine
from logitcask.pipeline.teachers.served.servers import Connection
from logitcask.pipeline.teachers.teacher import TeacherFacts, teacher_id
from logitcask.pipeline.text.bad_records import BadRecords, skipped_file
from logitcask.pipeline.text.chats.template import kwargs_text
from logitcask.pipeline.text.reading import Reading, changed_files, record_files
from logitcask.pipeline.text.tokenizer import identify, tokenizer_files, tokenizer_size
from logitcask.pipeline.text.tokens.stage import stage_tokens
from logitcask.pipeline.text.tokens.workers import processes
from logitcask.pipeline.vocabulary.alignment import kinds_line
from logitcask.pipeline.vocabulary.spread import Spread

ENGINES = {
    "transformers": "transformers",
    "vllm": "vllm",
    "vllm-topk": "vllm prompt_logprobs",
    "server": "server",
}  # as manifests name them
IN_VLLM = {ENGINES["vllm"], ENGINES["vllm-topk"]}
BATCHES_PER_CALL = {"vllm": 64, "vllm-topk": 64}  # vLLM schedules them itself


def precompute(settings: PrecomputeSettings) -> PrecomputeReport:
    """Make the cache, or finish an interrupted one. Raises LogitcaskError for any error that the user can fix."""
    with explain_out_of_memory(memory_remedy(settings)):
        return _precompute(settings, time.monotonic())


def _precompute(settings: PrecomputeSettings, started: float) -> PrecomputeReport:
    tokenizers = load_tokenizers(settings)
    size = tokenizer_size(tokenizers.cache)
    if settings.head_size + settings.tail_draws > size:
        entries = settings.head_size + settings.tail_draws
        raise LogitcaskError(
            f"--head-size + --tail-draws must be at most the vocabulary's {size} tokens, got {entries}: lower one"
        )
    with sole_writer(settings.output, settings.part, say) as staging, contextlib.ExitStack() as cleanup:
        if settings.ray is not None:
            cleanup.callback(disconnect)
        require_folder = watch_folder(settings.output)
        files = tokenizer_files(tokenizers.cache)
        stored = stored_manifest(settings.output, overwrite=settings.overwrite)
        before = None if settings.overwrite else stored
        settings = _resumed(settings, before)
        reading = Reading(settings.train_data, **settings.taken)
        work, parts = _plan(settings, reading, tokenizers, files, staging, before)
        mine = shards_of(settings.part or (1, 1), parts["shards"].count)
        if before:  # before loading a large teacher in vain
            _require_same(settings, reading, before, parts)
            if _is_done(settings, tokenizers.teacher, before, mine):
                return PrecomputeReport(before, 0, len(mine), time.monotonic() - started)
        say(data_line(parts["data"]), "data")
        if work.table.kinds:
            say(kinds_line(work.table.kinds), "positions")
        with contextlib.closing(_executor(settings, tokenizers.spread(work.table))) as executor:
            say(teacher_line(executor.teacher), "teacher")
            check_teacher(executor.teacher, tokenizer_size(tokenizers.teacher), settings.max_seq_length)
            head = None
            if settings.preset == "exact":
                head, code = _head_and_code(settings, before, executor, work)
                label = work.label.model_copy(update={"exact": code})
                parts |= {"label": label, "teacher_head": head.identity}
            with explain_limits():
                manifest = Manifest.model_validate({**parts, "teacher": executor.teacher.identity})
            with explain_write_errors(settings.output):
                require_folder()  # loading a teacher takes a while
                writer = create_cache(
                    settings.output,
                    manifest,
                    work.shard_examples,
                    files,
                    head=head,
                    overwrite=settings.overwrite,
                    shards=None if settings.part is None else mine,
                )
            if before is None:
                record_files(settings.output, reading)
            manifest, missing = writer.manifest, writer.missing_shards()
            if missing and executor.teacher.identity.engine in IN_VLLM and not settings.skip_engine_check:
                executor.check_engine(work.batches(missing[0])[-1], work.label)
            done, tokens = [shard for shard in mine if shard not in missing], [work.tokens(shard) for shard in missing]
            if done:
                say(f"{len(done):,} of {len(mine):,} shards are already written", "resumed")
            if missing and before is not None:
                executor.check_resumed(work)
            with track("labelling", sum(tokens), "tokens", place=shard_place(tokens)) as advance:
                executor.write_shards(work, missing, manifest, advance)
    return PrecomputeReport(manifest, len(missing), len(done), time.monotonic() - started)


def _resumed(settings: PrecomputeSettings, stored: Manifest | None) -> PrecomputeSettings:
    """Return the settings with what was left open as in the cache that is resumed, whatever would be chosen here."""
    if stored is None:
        return with_length(settings)
    engine = next((name for name, stands_for in ENGINES.items() if stands_for == stored.teacher.engine), "auto")
    auto = {"dtype": stored.teacher.dtype, "engine": engine}
    same: dict[str, Any] = {name: value for name, value in auto.items() if getattr(settings, name) == "auto"}
    if "max_seq_length" not in settings.model_fields_set:
        same["max_seq_length"] = stored.data.max_seq_length
    if engine == "server" and same.get("engine") == "server":
        raise LogitcaskError(
            f"{settings.output}: was labelled by a server: add --engine server --base-url URL to resume"
        )
    return settings.model_copy(update=same)


def _head_and_code(
    settings: PrecomputeSettings, stored: Manifest | None, executor: LocalExecutor | RayExecutor, work: Work
) -> tuple[TeacherHead, ExactCode]:
    """Return the teacher's head and the code of exact labels: those of the cache that is resumed, if they are sound."""
    if stored is not None and stored.label.exact is not None:
        with contextlib.suppress(CacheFormatError):
            return CacheReader(settings.output, partial=True).teacher_head(), stored.label.exact
    say("fitting the code of hidden states to this teacher: seconds, minutes if it is wider than 4,000", "basis")
    return executor.fitted_head(work.calibration(), work.label, settings.hidden_bits)


def _require_same(settings: PrecomputeSettings, reading: Reading, stored: Manifest, parts: dict[str, Any]) -> None:
    """Raise CacheMismatchError, naming the data that changed, unless this run may resume the cache."""
    try:
        require_same(settings.output, stored, parts)
    except CacheMismatchError as error:
        if parts["data"].fingerprint == stored.data.fingerprint:
            raise
        changes = changed_files(settings.output, reading)
        raise CacheMismatchError(f"{error}{changes}") from error


def _is_done(settings: PrecomputeSettings, tokenizer: PreTrainedTokenizerBase, stored: Manifest, mine: range) -> bool:
    """Return whether all shards of this run are committed, by a teacher of the same name, dtype and engine.

    Only loading it would show whether its weights are the same: for a local teacher, which may have changed, that is
    said; for one of the hub the revision is compared.
    """
    teacher = stored.teacher
    revision = None  # of a server it is not known
    if settings.engine != "server":
        revision = tokenizer.init_kwargs.get("_commit_hash") or settings.teacher_revision
    asked = (
        teacher_id(settings.teacher_model),
        settings.dtype,
        ENGINES.get(settings.engine),
        revision or teacher.revision,
    )
    if asked != (teacher.id, teacher.dtype, teacher.engine, teacher.revision):
        return False
    if settings.preset == "exact" and stored.label.exact is None:
        return False
    if set(mine) - committed_shards(open_store(settings.output, read_only=True), stored.shards.count):
        return False
    if Path(settings.teacher_model).exists():
        say(f"{settings.teacher_model} was not loaded: whether its weights are still the cache's was not checked")
    return True


def memory_remedy(settings: PrecomputeSettings) -> str:
    """Return the options that lower the memory of stage 1, with their current values, most effective first."""
    return (
        f"lower --batch-size from {settings.batch_size}, --max-seq-length from {settings.max_seq_length} or "
        f"--shard-positions from {settings.shard_positions} (the last two make another cache), or take a smaller "
        f"teacher or --dtype than {settings.dtype}; committed shards are kept"
    )


def teacher_spec(settings: PrecomputeSettings) -> TeacherSpec:
    """Return what a worker needs to load the teacher."""
    connection = None
    if settings.engine == "server":
        connection = Connection(
            settings.base_url or (), settings.concurrency, settings.request_timeout, settings.max_retries
        )
    return TeacherSpec(
        model=settings.teacher_model,
        revision=settings.teacher_revision,
        engine=settings.engine,
        dtype=settings.dtype,
        device=settings.device,
        max_seq_length=settings.max_seq_length,
        tensor_parallel_size=settings.tensor_parallel_size,
        trust_remote_code=settings.trust_remote_code,
        head_size=settings.head_size,
        tokenizer=settings.tokenizer_source,
        connection=connection,
        student_tokenizer=settings.student_tokenizer,
    )


def _executor(settings: PrecomputeSettings, spread: Spread | None) -> LocalExecutor | RayExecutor:
    spec = replace(teacher_spec(settings), spread=spread)
    if settings.ray is None:
        return LocalExecutor(spec, settings.output)
    return RayExecutor(
        spec, settings.output, address=settings.ray, workers=settings.workers, memory_remedy=memory_remedy(settings)
    )


def _plan(
    settings: PrecomputeSettings,
    reading: Reading,
    tokenizers: Tokenizers,
    files: dict[str, bytes],
    staging: Path,
    stored: Manifest | None,
) -> tuple[Work, dict[str, Any]]:
    """Return what there is to label, and all parts of the manifest except the teacher's."""
    pinned = datetime.date.fromisoformat(stored.data.date) if stored and stored.data.date else None
    encoder = make_encoder(settings, tokenizers, pinned)
    bad = BadRecords(skipped_file(settings.output), settings.bad_share)
    table = stage_tokens(
        encoder,
        settings.train_data,
        staging,
        bad=bad,
        max_seq_length=settings.max_seq_length,
        records=reading,
        workers=processes(settings.tokenize_workers) if settings.ray is None else tasks(settings.ray),
        resumable=True,
    )
    if stored is not None and stored.data.metadata is None:  # a cache of an earlier version, which kept none
        table = replace(table, identity=table.identity.model_copy(update={"metadata": None}), codes={})
    rendering = {"date": encoder.date, "chat_template_kwargs": kwargs_text(settings.chat_template_kwargs)}
    if stored is not None and stored.format_version < 5:  # earlier formats had none of them
        rendering = dict.fromkeys(rendering)
    order = shuffled(len(table), settings.seed)
    positions = table.positions[order].astype(np.int64)
    shard_examples = cut_shards(positions, settings.shard_positions)
    label = LabelSettings(
        vocab_size=tokenizer_size(tokenizers.cache),
        head_size=settings.head_size,
        tail_draws=settings.tail_draws,
        temperatures=list(settings.temperatures),
        seed=settings.seed,
        fidelity_positions=settings.fidelity_positions,
        exact=_as_stored(settings, stored),
    )
    with explain_limits():
        parts = {
            "format_version": EXACT_VERSION if settings.preset == "exact" else FORMAT_VERSION,
            "tokenizer": identify(tokenizers.cache, files),
            "data": table.identity.model_copy(update=rendering),
            "label": label,
            "shards": plan_strides(shard_examples, np.diff(table.starts)[order], positions),
            **tokenizers.other_vocabulary(table),
        }
    batches = BATCHES_PER_CALL.get(choose_engine(settings.engine, settings.teacher_model), 1)
    return Work(table, order, shard_examples, settings.batch_size * settings.max_seq_length * batches, label), parts


def _as_stored(settings: PrecomputeSettings, stored: Manifest | None) -> ExactCode | None:
    """Return what is known of the code of exact labels before the teacher is loaded."""
    if settings.preset != "exact" or stored is None or stored.label.exact is None:
        return None
    return stored.label.exact.model_copy(update={"bits": settings.hidden_bits})


def check_teacher(teacher: TeacherFacts, vocabulary: int, max_seq_length: int) -> None:
    """Raise LogitcaskError if the teacher does not fit its tokenizer or the requested length."""
    if vocabulary > teacher.logits_width:
        raise LogitcaskError(
            f"the tokenizer has {vocabulary} tokens, the teacher's head {teacher.logits_width} rows: they do not match"
        )
    if teacher.max_length is not None and max_seq_length > teacher.max_length:
        raise LogitcaskError(
            f"--max-seq-length {max_seq_length} is more than the teacher's {teacher.max_length}: lower it"
        )
