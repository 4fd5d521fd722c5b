"""Caches as torch sees them: data set, collator, loader."""

import math

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.labels import temperature_index
from logitcask.library.caches import Cache
from logitcask.library.mix import Mix
from logitcask.pipeline.batches.collate import Collator, MixedCollator
from logitcask.pipeline.batches.dataset import CacheDataset
from logitcask.pipeline.batches.loader import Loader
from logitcask.pipeline.batches.mixing import common_tail, require_one_teacher
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.models.dense.rows import EXACT

TAILS = ("sampled", "bucket", "renormalize")


def loader(
    source: Cache | Mix,
    batch_size: int = 8,
    temperature: float = 1.0,
    *,
    tail: str | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    num_workers: int = 0,
    packed: bool = False,
) -> Loader:
    """Return a loader of batches of a cache or a mixture, for a loop of one's own. Needs torch.

        for batch in logitcask.loader(cache, batch_size=8, temperature=1.0):
            loss = logitcask.kd_loss(model, batch, alpha=0.1)

    A batch is a dict: ``input_ids`` (R, L), padded on the right; ``target_index`` (N,) into the flattened rows;
    ``gold`` (N,), the tokens that came next; ``is_token`` (R, L); ``slots`` (2,), tokens and places; ``soft_labels``,
    and with ``packed`` rows ``position_ids`` (R, L). With several ranks, each takes its share of every step of
    ``batch_size`` times ``ranks`` examples. Unless packed, a cache's batches hold examples of similar lengths. Raises
    LogitcaskError as ``Cache.collator`` does, and if a number is out of range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("ranks", ranks, 1),
        ("num_workers", num_workers, 0),
        ("seed", seed, 0),
        ("rank", rank, 0),
    ):
        if value < least:
            raise LogitcaskError(f"loader: {name} must be at least {least}, got {value}")
    if rank >= ranks:
        raise LogitcaskError(f"loader: rank must be below ranks, got rank {rank} of {ranks}")
    return Loader(
        source.dataset(),
        source.collator(temperature, tail, packed=packed),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        ranks=ranks,
        num_workers=num_workers,
    )


def dataset_of(source: Cache | Mix) -> CacheDataset:
    """Return the data set of a cache or a mixture."""
    if isinstance(source, Mix):
        readers = [cache.reader for cache in source.caches]
        return CacheDataset(readers, source.weights, source.seed, source.stop)
    return CacheDataset([source.reader], (1.0,), 0, "first")


def collator_of(source: Cache | Mix, temperature: float, tail: str | None, *, packed: bool) -> Collator:
    """Return the collator of a cache or a mixture. Raises LogitcaskError if a cache lacks what it needs."""
    caches = source.caches if isinstance(source, Mix) else (source,)
    labels = [cache.label for cache in caches]
    tail, teacher_head = tail or common_tail(labels), None
    if tail == EXACT:
        require_one_teacher([cache.path for cache in caches], [cache.reader.manifest for cache in caches])
        if not 0 < temperature < math.inf:
            raise LogitcaskError(f"temperature must be above 0, got {temperature:g}")
        teacher_head = StoredHead(tuple((cache.path, cache.reader.opened) for cache in caches))
    for cache in caches if tail != EXACT else ():
        _require_temperature(cache, temperature)
        if tail not in TAILS:
            raise LogitcaskError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
        if fault := cache.label.tail_fault(tail):
            raise LogitcaskError(f"{cache.path}: tail={tail!r} {fault[0]}: use tail={fault[1]!r}")
    if isinstance(source, Cache):
        return Collator(0, source.temperatures, temperature, tail, packed, teacher_head)
    return MixedCollator(
        pad_id=0,
        temperatures=source.temperatures,
        temperature=temperature,
        tail=tail,
        packed=packed,
        teacher_head=teacher_head,
        by_source=tuple(cache.temperatures for cache in caches),
        head_size=min(label.head_size for label in labels),
    )


def _require_temperature(cache: Cache, temperature: float) -> None:
    try:
        temperature_index(cache.temperatures, temperature)
    except LogitcaskError as error:
        stored = ", ".join(f"{t:g}" for t in cache.temperatures)
        raise CacheMismatchError(
            f"{cache.path}: temperature {temperature:g} is not stored: it holds {stored}"
        ) from error
