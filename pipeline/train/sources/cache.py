"""A cache as the source of a run's examples in stage 2."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.fidelity import BATCH, figures
from logitcask.cache.labels import IntArray, temperature_index
from logitcask.cache.manifest import sha256
from logitcask.cache.reader import KEPT_BYTES, CacheReader, matching
from logitcask.cache.report.label_figures import fidelity_of
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.console import say
from logitcask.pipeline.models.dense.rows import EXACT
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.text.tokenizer import fingerprint, has_tokenizer, require_tokenizer, tokenizer_from_files
from logitcask.pipeline.train.sources.source import Source


def cache_source(
    reader: CacheReader,
    disk_cache: DiskCache,
    *,
    soft: bool,
    temperature: float,
    tail: str,
    divergence: str,
    min_fidelity: float | None,
    same_tokenizer: Mapping[str, Mapping[str, Any]],
    where: Mapping[str, Sequence[str]] | None = None,
    of: int = 1,
) -> Source:
    """Return an open cache as the source of a run, one ``of`` several. Raises LogitcaskError if it does not fit.

    ``soft``: whether the loss needs labels; ``same_tokenizer``: models whose tokenizer, if they bring one, must
    equal the cache's, and how they are loaded; ``where``: the values that the examples must have, by column.
    """
    cache, label, data = reader.path, reader.manifest.label, reader.manifest.data
    if soft:
        _require_labels(reader, temperature, tail, divergence, min_fidelity, f"{cache}: " if of > 1 else "")
    exact = label.exact if soft and tail == EXACT else None
    tokenizer = _cache_tokenizer(reader, cache, same_tokenizer)
    chosen = matching(reader, where) if where else None
    starts, amount = reader.shard_starts, Amount(data.examples, data.tokens, data.positions)
    if chosen is not None:
        starts = np.unique(np.searchsorted(chosen, starts))  # shards without such an example are left out
        sums = [int(_counts(reader, name, chosen).sum()) for name in ("token_count", "position_count")]
        amount = Amount(len(chosen), *sums)
        say(f"{cache}: {len(chosen):,} of {data.examples:,} examples are taken")
    return Source(
        name=cache,
        examples=CacheExamples(
            cache,
            with_targets=soft,
            disk_cache=disk_cache,
            opened=reader.opened,
            chosen=chosen,
            kept_bytes=KEPT_BYTES // of,
        ),
        tokenizer=tokenizer,
        vocab_size=label.vocab_size,
        longest=data.longest,
        temperatures=tuple(label.temperatures),
        tail=tail,
        head_size=label.head_size,
        labelled=soft,
        shard_starts=starts,
        identity=cache_identity(reader) + (json.dumps(dict(where)) if where else ""),
        amount=amount,
        lengths=lambda: _counts(reader, "token_count", chosen),
        positions=lambda: _counts(reader, "position_count", chosen),
        teacher_head=StoredHead(((cache, reader.opened),)) if exact else None,
        teacher_bytes=4 * label.vocab_size * exact.width if exact else 0,
    )


def _counts(reader: CacheReader, name: str, chosen: IntArray | None) -> IntArray:
    """Return a number of each of the chosen examples, or of all: its tokens or target positions."""
    numbers = reader.counts(name, range(reader.manifest.shards.count))
    return numbers if chosen is None else numbers[chosen]


def _require_labels(
    reader: CacheReader, temperature: float, tail: str, divergence: str, min_fidelity: float | None, where: str
) -> None:
    """Raise LogitcaskError, starting with ``where``, unless the labels suit the loss; say what a tail leaves out."""
    label = reader.manifest.label
    if tail == EXACT:
        if label.exact is None:
            raise LogitcaskError(f"{reader.path}: has sparse labels, and the run trains on exact ones")
        if min_fidelity is not None:
            require_fidelity(reader, temperature_index(label.temperatures, temperature), min_fidelity)
        return
    j = temperature_index(label.temperatures, temperature)
    if fault := label.tail_fault(tail):
        raise LogitcaskError(f"{where}--tail {tail} {fault[0]}: use --tail {fault[1]}")
    if divergence != "forward-kl" and tail != "bucket":
        raise LogitcaskError(
            f"{where}--divergence {divergence} requires --tail bucket, or a cache of exact labels (precompute-logits "
            f"--preset exact), and the tail is {tail}"
        )
    if tail == "renormalize" and not label.knows("rest"):
        say("tail renormalize: the cache was imported without the mass outside its head, which counts as none")
    elif tail == "renormalize":
        captured = float(-np.expm1(reader.shard(0).targets.log_tail_mass[:, j].astype(np.float64)).mean())
        say(
            f"tail renormalize: the head holds {captured:.1%} of the teacher's mass at this temperature; "
            "the rest is ignored, which biases the student away from the teacher"
        )
    if min_fidelity is not None:
        require_fidelity(reader, j, min_fidelity)


def _cache_tokenizer(
    reader: CacheReader, cache: str, same_tokenizer: Mapping[str, Mapping[str, Any]]
) -> PreTrainedTokenizerBase:
    """Return a cache's tokenizer. Raises CacheMismatchError if it loads as another, or a model's own is another."""
    tokenizer, wanted = tokenizer_from_files(reader.tokenizer_files()), reader.manifest.tokenizer.fingerprint
    if fingerprint(tokenizer) != wanted:
        raise CacheMismatchError(
            f"{cache}: its tokenizer files load as another tokenizer than it was made with: fingerprints {wanted[:12]} "
            f"and {fingerprint(tokenizer)[:12]}: use the version of transformers it was made with, or make it anew"
        )
    for model, loading in same_tokenizer.items():
        if has_tokenizer(model):
            require_tokenizer(model, wanted, cache, **loading)
        else:
            say(f"{model}: holds no tokenizer: the cache's is used")
    return tokenizer


def cache_identity(reader: CacheReader) -> str:
    """Return the digest of a cache's manifest, which the settings of a run on it hold as ``source``."""
    return sha256(reader.manifest.model_dump_json().encode())


def require_fidelity(reader: CacheReader, j: int, wanted: float) -> None:
    """Raise LogitcaskError if the cosine in the cache's certificate at temperature j is below ``wanted`` or missing."""
    temperatures = reader.manifest.label.temperatures
    sums = fidelity_of(reader, range(reader.manifest.shards.count))
    measured = figures(sums, len(temperatures))
    if measured is None:
        raise LogitcaskError(
            f"--min-fidelity {wanted}: {reader.path} was measured on {sums.positions:g} positions, too few for a "
            "certificate: precompute it with more --fidelity-positions, or omit this option"
        )
    cosine = measured[j][0].cosine
    if cosine < wanted:
        raise LogitcaskError(
            f"--min-fidelity {wanted}: not good enough: at T={temperatures[j]:g} the cosine between {reader.path}'s "
            f"gradient and the exact one is {cosine:.4f} over {BATCH} positions: use a richer --preset in stage 1, "
            "another --temperature, or a lower --min-fidelity"
        )
