"""Proving a cache: every object against its digest, then the labels against the manifest and each other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache.errors import CacheFormatError, LogitcaskError
from cache.integrity import commit_key, committed_shards, constant_damage, constant_objects, shard_damage, shard_keys
from cache.layout import HEAD_SCALE, MASS_SCALE, PARTITION_SCALE, array_specs
from cache.lock import sole_writer
from cache.manifest import LabelSettings, Manifest
from cache.reader import CacheReader, read_manifest
from cache.shard import Shard
from cache.store import delete_objects, open_store


@dataclass(frozen=True)
class Verification:
    """What was checked, and every problem found."""

    shards: int
    missing: list[int] = field(default_factory=list)  # not committed
    constants: list[str] = field(default_factory=list)  # problems outside the shards
    damaged: dict[int, list[str]] = field(default_factory=dict)  # problems by shard

    @property
    def problems(self) -> list[str]:
        """All problems, one line each."""
        lines = [*self.constants, *(f"shard {shard}: not committed" for shard in self.missing)]
        return lines + [f"shard {shard}: {line}" for shard, found in self.damaged.items() for line in found]


def verify(path: str | Path, advance: Callable[[int], None] = lambda shards: None) -> Verification:
    """Check a whole cache, calling ``advance(1)`` after each shard.

    Raises CacheFormatError only where there is no manifest to check by.
    """
    store = open_store(path, read_only=True)
    manifest = read_manifest(store, str(path))
    specs = array_specs(manifest.label)
    constants = constant_damage(store, constant_objects(specs, list(manifest.tokenizer.files)))
    done = committed_shards(store, manifest.shards.count)
    missing = sorted(set(range(manifest.shards.count)) - done)
    damaged: dict[int, list[str]] = {}
    reader = None if constants else CacheReader(path, partial=True)
    for index in sorted(done):
        problems = shard_damage(store, specs, index)
        if not problems and reader is not None:
            problems = _meaning(reader, index, manifest)
        if problems:
            damaged[index] = problems
        advance(1)
    return Verification(manifest.shards.count, missing, constants, damaged)


def repair(path: str | Path, found: Verification) -> list[int]:
    """Drop the damaged shards, commit records first, so that stage 1 does only those again; returns them.

    Raises LogitcaskError where objects outside the shards are damaged: those cannot be made again from the rest.
    """
    if found.constants:
        raise LogitcaskError(
            f"{path}: cannot be repaired: {'; '.join(found.constants)}: copy these objects again from a good cache"
        )
    with sole_writer(path):
        store = open_store(path, read_only=False)
        specs = array_specs(read_manifest(store, str(path)).label)
        for index in found.damaged:
            delete_objects(store, [commit_key(index), *shard_keys(specs, index)])
    return sorted(found.damaged)


def _meaning(reader: CacheReader, index: int, manifest: Manifest) -> list[str]:
    """Problems of a shard whose bytes are those that were written."""
    try:
        shard = reader.shard(index)
    except CacheFormatError as error:
        return [str(error)]
    return list(_problems(shard, manifest.label))


def _problems(shard: Shard, label: LabelSettings) -> Iterator[str]:
    targets, vocab = shard.targets, label.vocab_size
    if int(shard.target_mask.sum()) != len(targets) or int(shard.position_count.sum()) != len(targets):
        yield "target_mask and position_count disagree"
    for name, ids in (("input_ids", shard.input_ids), ("head_ids", targets.head_ids), ("tail_ids", targets.tail_ids)):
        if ids.size and int(ids.max()) >= vocab:
            yield f"{name}: id {int(ids.max())} is outside the vocabulary of {vocab}"
    drawn = targets.tail_counts.sum(1)
    if not np.isin(drawn, (0, label.tail_draws)).all():
        yield f"tail_counts: a row must sum to 0 or {label.tail_draws}"
    head, mass = targets.head_logprobs.astype(np.float64), targets.log_tail_mass.astype(np.float64)
    slack = HEAD_SCALE + MASS_SCALE + 2 * PARTITION_SCALE
    for j, temperature in enumerate(label.temperatures):
        log_p = head / temperature - targets.log_partition[:, j, None]
        with np.errstate(divide="ignore"):
            total = np.log(np.exp(log_p).sum(1) + np.exp(mass[:, j]))
        if not np.all(np.abs(total) <= slack):
            worst = float(np.exp(total[np.abs(total).argmax()]))
            yield f"head and tail mass at T={temperature:g} must sum to 1, sum to {worst:.3g}"
