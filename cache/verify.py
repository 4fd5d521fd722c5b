"""Verification and repair: every object against its digest, then the labels against the manifest and each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from zarr.abc.store import Store

from logitcask.cache.errors import CacheFormatError, LogitcaskError
from logitcask.cache.integrity import (
    commit_key,
    committed_shards,
    constant_damage,
    constant_objects,
    shard_damage,
    shard_keys,
)
from logitcask.cache.invariants import inconsistent
from logitcask.cache.labels import IntArray
from logitcask.cache.layout import shard_specs
from logitcask.cache.manifest import Manifest
from logitcask.cache.reader import CacheReader, read_manifest
from logitcask.cache.storage.bounded import require_inside
from logitcask.cache.storage.open import delete_objects, open_store
from logitcask.cache.storage.ownership import sole_writer
from logitcask.cache.storage.url import is_url


@dataclass(frozen=True)
class Verification:
    """The number of shards checked, and every problem found."""

    shards: int
    missing: list[int] = field(default_factory=list)  # not committed
    constants: list[str] = field(default_factory=list)  # problems outside the shards
    damaged: dict[int, list[str]] = field(default_factory=dict)  # problems by shard

    @property
    def problems(self) -> list[str]:
        """All problems, one line each."""
        lines = [*self.constants, *(f"shard {shard}: not committed" for shard in self.missing)]
        return lines + [f"shard {shard}: {line}" for shard, problems in self.damaged.items() for line in problems]

    @property
    def remedy(self) -> str:
        """What to do about the problems."""
        if self.constants:
            return "copy the objects outside the shards again from a good cache"
        if self.damaged:
            return "drop damaged shards with --repair"
        return "no shard is damaged: run the command that made the cache again to finish it"


def verify(path: str | Path | Store, advance: Callable[[int], None] = lambda shards: None) -> Verification:
    """Check a whole cache, calling ``advance(1)`` after each shard.

    Raises CacheFormatError only if there is no manifest to check against.
    """
    store = path if isinstance(path, Store) else open_store(path, read_only=True)
    manifest = read_manifest(store, str(path))
    specs = shard_specs(manifest)
    constants = constant_damage(store, constant_objects(manifest))
    reader = None
    if not constants:
        try:
            reader = CacheReader(path, partial=True)
            reader.tokenizer_files()
            if manifest.teacher_head:
                reader.teacher_head()
        except CacheFormatError as error:
            constants.append(str(error))
    done = committed_shards(store, manifest.shards.count)
    missing = sorted(set(range(manifest.shards.count)) - done)
    damaged: dict[int, list[str]] = {}
    totals = np.zeros(2, dtype=np.int64)
    for index in sorted(done):
        problems = shard_damage(store, specs, index)
        if not problems and reader is not None:
            problems = _label_problems(reader, index, manifest, totals)
        if problems:
            damaged[index] = problems
        advance(1)
    if not (constants or missing or damaged) and totals.tolist() != [manifest.data.tokens, manifest.data.positions]:
        constants.append(
            f"the shards hold {totals[0]} tokens and {totals[1]} positions, the manifest says "
            f"{manifest.data.tokens} and {manifest.data.positions}"
        )
    return Verification(manifest.shards.count, missing, constants, damaged)


def repair(path: str | Path, verification: Verification) -> list[int]:
    """Drop the damaged shards, commit records first, so that stage 1 redoes only those; return their numbers.

    Raises LogitcaskError if objects outside the shards are damaged: they cannot be rebuilt from the rest.
    """
    if verification.constants:
        raise LogitcaskError(
            f"{path}: cannot be repaired: {'; '.join(verification.constants)}: "
            "copy these objects again from a good cache, or run the command that made the cache again"
        )
    if is_url(path) or not Path(path).is_dir():
        raise LogitcaskError(
            f"{path}: only a cache in a folder can be repaired: copy it to a folder with logitcask cache copy"
        )
    with sole_writer(path):
        store = open_store(path, read_only=False)
        specs = shard_specs(read_manifest(store, str(path)))
        for index in verification.damaged:
            for key in shard_keys(specs, index):
                require_inside(store, key)
            delete_objects(store, [commit_key(index), *shard_keys(specs, index)])
    return sorted(verification.damaged)


def _label_problems(reader: CacheReader, index: int, manifest: Manifest, totals: IntArray) -> list[str]:
    """Return the problems of a shard whose digests are right; add its tokens and positions to ``totals``."""
    try:
        shard = reader.shard(index)
    except CacheFormatError as error:
        return [str(error)]
    totals += (len(shard.input_ids), len(shard.targets))
    problems = inconsistent(shard, manifest.label)
    if manifest.label.fidelity_positions:
        try:
            measured = reader.shard_fidelity(index).positions
            if measured > len(shard.targets):
                problems.append(f"fidelity: measured on {measured:g} positions, but the shard has {len(shard.targets)}")
        except CacheFormatError as error:
            problems.append(str(error))
    try:
        reader.made_by(index)
        if manifest.teacher_tokenizer:
            reader.shard_projection(index)
    except CacheFormatError as error:
        problems.append(str(error))
    return problems
