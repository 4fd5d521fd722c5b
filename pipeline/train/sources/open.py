"""Opens what the settings of a run name as the source of its examples."""

from pathlib import Path
from typing import Any

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.labels import temperature_index
from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.batches.mixing import (
    common_tail,
    common_temperatures,
    require_one_teacher,
    require_one_tokenizer,
    require_shares,
)
from logitcask.pipeline.console import say
from logitcask.pipeline.models.dense.rows import EXACT
from logitcask.pipeline.models.load import require_plain_weights
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.bad_records import BadRecords, skipped_file
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.tokenizer import fingerprint
from logitcask.pipeline.train.sources.cache import cache_identity, cache_source
from logitcask.pipeline.train.sources.file import file_source, text_source
from logitcask.pipeline.train.sources.mixed import mixed_source
from logitcask.pipeline.train.sources.source import Source


def open_source(settings: TrainSettings, folder: Path) -> Source:
    """Open caches and data files; tokens of files are staged in ``folder``.

    Raises LogitcaskError if one does not fit the run, or several do not fit each other.
    """
    caches, texts = settings.weighted_caches, settings.weighted_texts
    weights = [weight for _, weight in (*caches, *texts) if weight is not None]
    if weights:
        require_shares(weights, "--cache and --train-data" if texts else "--cache")
    trained = settings.teacher_model if settings.init_from_teacher_layers else settings.student_model
    if trained is not None:
        require_plain_weights(trained)
    if not caches:
        assert settings.train_data is not None
        return file_source(
            Reading(settings.train_data, **settings.taken),
            folder,
            student_model=settings.student_model,
            loading=settings.loading,
            teacher_model=settings.teacher_model,
            online=settings.soft,
            device=settings.device,
            chat_template=settings.chat_template,
            chat_template_kwargs=settings.chat_template_kwargs,
            **_reading_options(settings, 1),
        )
    disk_cache = DiskCache(settings.copies_folder, int(settings.local_copies_gb * 1e9))
    readers = [CacheReader(place, disk_cache=disk_cache) for place, _ in caches]
    parts = _cache_sources(settings, readers, disk_cache)
    if not weights:
        return parts[0]
    for number, (text, _) in enumerate(texts, 1):
        staged = folder / str(number)
        staged.mkdir(exist_ok=True)
        reading, tokenizer = Reading((text,), **settings.taken), parts[0].tokenizer
        parts.append(text_source(reading, staged, tokenizer, **_reading_options(settings, number)))
    return mixed_source(parts, weights)


def open_held_out(settings: TrainSettings, source: Source) -> Source | None:
    """Open the cache that a run is evaluated on, if it has one of its own.

    Raises LogitcaskError if it does not fit the run's source.
    """
    if settings.eval_cache is None:
        return None
    disk_cache = DiskCache(settings.copies_folder, int(settings.local_copies_gb * 1e9))
    reader = CacheReader(settings.eval_cache, disk_cache=disk_cache)
    wanted, own = fingerprint(source.tokenizer), reader.manifest.tokenizer.fingerprint
    if own != wanted:
        raise CacheMismatchError(
            f"--eval-cache {reader.path}: was made with another tokenizer than {source.name}: fingerprints {own[:12]} "
            f"and {wanted[:12]}: make it with the same teacher"
        )
    if cache_identity(reader) in source.identity:
        say(f"--eval-cache {reader.path}: the run trains on it: only other examples show what the student has learnt")
    return cache_source(
        reader,
        disk_cache,
        soft=source.labelled,
        temperature=settings.temperatures.last,
        tail=source.tail,
        divergence=settings.divergence,
        min_fidelity=None,
        same_tokenizer={},
        of=2,
    )


def _cache_sources(settings: TrainSettings, readers: list[CacheReader], disk_cache: DiskCache) -> list[Source]:
    manifests = [reader.manifest for reader in readers]
    labels = [manifest.label for manifest in manifests]
    soft, ends, tail = settings.soft, settings.temperatures, settings.tail or common_tail(labels)
    if len(readers) > 1:
        require_one_tokenizer([reader.path for reader in readers], manifests)
    if soft and tail == EXACT:
        require_one_teacher([reader.path for reader in readers], manifests)
    elif len(readers) > 1 and soft:
        common = common_temperatures([label.temperatures for label in labels])
        missing = [end for end in ends if all(abs(t - end) > 1e-6 for t in common)]
        if missing:
            stored = ", ".join(f"{t:g}" for t in common)
            raise LogitcaskError(f"--temperature {missing[0]:g} is not stored in every cache: all hold {stored}")
    elif soft:
        temperature_index(labels[0].temperatures, ends.first)
    models = {settings.student_model, settings.teacher_model} - {None}
    return [
        cache_source(
            reader,
            disk_cache,
            soft=soft,
            temperature=ends.last,
            tail=tail,
            divergence=settings.divergence,
            min_fidelity=settings.min_fidelity,
            where=settings.where,
            same_tokenizer={
                str(model): settings.loading if model == settings.student_model else {} for model in models
            },
            of=len(readers),
        )
        for reader in readers
    ]


def _reading_options(settings: TrainSettings, number: int) -> dict[str, Any]:
    """Return how the ``number``-th data file is read."""
    skipped = skipped_file(settings.output_dir if number == 1 else f"{settings.output_dir}.{number}")
    return {
        "max_seq_length": settings.max_seq_length,
        "chat_turns": settings.chat_turns,
        "columns": settings.renamed,
        "bad": BadRecords(skipped, settings.bad_share),
    }
