"""Moving a cache: every object is proved by its digest where it is read, and again where it was written.

A shard's commit record is written last, so an interrupted copy is a cache that lacks shards, and the same copy goes on.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zarr.abc.store import Store

from logitcask.cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    IncompleteCacheError,
    LogitcaskError,
    differences,
)
from logitcask.cache.integrity import (
    SEAL_OBJECTS,
    commit_key,
    commit_record,
    committed_shards,
    constant_objects,
    digest,
    read_proved,
    shard_keys,
)
from logitcask.cache.layout import array_specs
from logitcask.cache.manifest import Manifest, PartIdentity, flatten
from logitcask.cache.reader import CacheReader, read_manifest
from logitcask.cache.storage.bounded import read_bounded
from logitcask.cache.storage.open import (
    delete_objects,
    drop_partial_objects,
    is_empty,
    is_url,
    open_store,
    write_objects,
)
from logitcask.cache.storage.ownership import explain_write_errors, sole_writer
from logitcask.cache.writer import create_cache, plan_digest

AT_ONCE = 8  # objects read or checked at the same time
Objects = dict[str, tuple[str, bytes]]  # key at the destination: key at the source, digest


@dataclass(frozen=True)
class Copied:
    """Shards that are whole at the destination: those brought now and those found there."""

    brought: int
    found: int
    bytes: int  # written now


def copy_cache(
    source: str, destination: str, shards: tuple[int, int] | None, advance: Callable[[int], None] = lambda shards: None
) -> Copied:
    """Copy a cache, or shards FIRST to STOP of it as a cache of their own, calling ``advance(1)`` after each shard.

    Either side is a folder, a .zip file or a URL. Raises IncompleteCacheError where the source lacks shards,
    CacheFormatError where it is damaged, CacheMismatchError where another cache lies at the destination.
    """
    store = open_store(source, read_only=True)
    manifest = read_manifest(store, source)
    chosen = _chosen_shards(store, source, manifest.shards.count, shards)
    with contextlib.ExitStack() as held:
        constants = store
        if len(chosen) < manifest.shards.count:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="logitcask-"))) / "part"
            manifest = _write_part_constants(source, chosen, folder)
            constants = open_store(folder, read_only=True)
        job = _Copy(store, constants, manifest, chosen, destination, advance)
        if is_url(destination):
            return job.run(open_store(destination, read_only=False))
        held.enter_context(sole_writer(destination))
        held.enter_context(explain_write_errors(destination))
        copy = _copy_to_zip if destination.endswith(".zip") else _copy_to_folder
        return copy(job, Path(destination))


def _copy_to_folder(job: "_Copy", folder: Path) -> Copied:
    store = open_store(folder, read_only=False)
    drop_partial_objects(store, lambda key: False)
    return job.run(store)


def _copy_to_zip(job: "_Copy", destination: Path) -> Copied:
    """Into a folder beside the file, which an interrupted copy leaves for the next; the file appears whole."""
    parts = destination.with_name(f".{destination.name}.parts")
    if destination.exists():
        copied = job.run(open_store(destination, read_only=True))
        shutil.rmtree(parts, ignore_errors=True)
        return copied
    copied = _copy_to_folder(job, parts)
    pack(parts, destination)
    return copied


def _chosen_shards(store: Store, source: str, count: int, shards: tuple[int, int] | None) -> range:
    first, stop = shards or (0, count)
    if not 0 <= first < stop <= count:
        raise LogitcaskError(f"--shards {first}:{stop}: {source} has shards 0:{count}: take FIRST:STOP within")
    missing = sorted(set(range(first, stop)) - committed_shards(store, count))
    if missing:
        raise IncompleteCacheError(
            f"{source}: {len(missing)} of the shards {first}:{stop} are not committed, the first is {missing[0]}: "
            "finish the cache, or take a part of it with --shards FIRST:STOP"
        )
    return range(first, stop)


def _write_part_constants(source: str, chosen: range, folder: Path) -> Manifest:
    """Write what belongs to no shard of a cache of some shards of another; returns its manifest."""
    reader = CacheReader(source, partial=True)
    whole = reader.manifest
    examples = np.diff(reader.shard_starts)[chosen.start : chosen.stop]
    held = {
        "examples": int(examples.sum()),
        "tokens": int(reader.counts("token_count", chosen).sum()),
        "positions": int(reader.counts("position_count", chosen).sum()),
    }
    before = whole.part or PartIdentity(first=0, of=whole.shards.count)
    manifest = whole.model_copy(
        update={
            "part": PartIdentity(first=before.first + chosen.start, of=before.of),
            "data": whole.data.model_copy(update=held),
            "shards": whole.shards.model_copy(update={"count": len(chosen), "digest": plan_digest(examples)}),
        }
    )
    create_cache(folder, manifest, examples, reader.tokenizer_files())
    return manifest


@dataclass(frozen=True)
class _Copy:
    """A copy of the ``chosen`` shards of ``source``; the objects of no shard come from ``constants``."""

    source: Store
    constants: Store
    manifest: Manifest
    chosen: range
    place: str
    advance: Callable[[int], None]

    def run(self, target: Store) -> Copied:
        """Copy into a store what it lacks; into one that is read only, nothing may lack."""
        _require_room(target, self.place, self.manifest)
        specs = array_specs(self.manifest.label)
        found = written = 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for step in self._constant_steps():
                written += self._bring(pool, self.constants, target, step)
            for index, origin in enumerate(self.chosen):
                record = commit_record(self.source, specs, origin)
                commit = commit_key(index), (commit_key(origin), hashlib.sha256(record).digest())
                keys = zip(shard_keys(specs, index), shard_keys(specs, origin), _digests(record), strict=True)
                if not target.read_only and digest(target, commit[0]) != commit[1][1]:
                    delete_objects(target, [commit[0]])
                brought = self._bring(pool, self.source, target, {key: (at, proof) for key, at, proof in keys})
                brought += self._bring(pool, self.source, target, dict([commit]))
                found += not brought
                written += brought
                self.advance(1)
        return Copied(len(self.chosen) - found, found, written)

    def _constant_steps(self) -> list[Objects]:
        """The manifest, so that an interrupted copy is known for what it is; what it tells of; the seal on them."""
        objects = constant_objects(array_specs(self.manifest.label), list(self.manifest.tokenizer.files))
        sealed = read_bounded(self.constants, SEAL_OBJECTS[1], 32 * len(objects)) or b""
        if len(sealed) != 32 * len(objects):
            raise CacheFormatError(f"{SEAL_OBJECTS[1]}: missing or cut")
        proofs = {key: (key, proof) for key, proof in zip(objects, _digests(sealed), strict=True)}
        manifest = {"zarr.json": proofs.pop("zarr.json")}
        return [manifest, proofs, {SEAL_OBJECTS[1]: (SEAL_OBJECTS[1], hashlib.sha256(sealed).digest())}]

    def _bring(self, pool: Executor, source: Store, target: Store, objects: Objects) -> int:
        """Write the objects that the target lacks and prove them there; returns their bytes."""

        def lacking() -> list[str]:
            have = pool.map(lambda key: digest(target, key), objects)
            return [key for (key, (_, proof)), found in zip(objects.items(), have, strict=True) if found != proof]

        wanted = lacking()
        if not wanted:
            return 0
        if target.read_only:
            raise CacheMismatchError(f"{self.place}: {wanted[0]} differs from the source's: remove it and copy again")
        data = list(pool.map(lambda key: read_proved(source, *objects[key]), wanted))
        write_objects(target, dict(zip(wanted, data, strict=True)))
        if wanted := lacking():
            raise CacheFormatError(f"{self.place}: {wanted[0]}: bytes differ after they were written: copy again")
        return sum(len(each) for each in data)


def _digests(joined: bytes) -> list[bytes]:
    return [joined[i : i + 32] for i in range(0, len(joined), 32)]


def _require_room(target: Store, place: str, wanted: Manifest) -> None:
    """Raise CacheFormatError or CacheMismatchError where anything but the beginning of this copy lies there."""
    if is_empty(target):
        return
    wrong = differences(flatten(dict(read_manifest(target, place))), flatten(dict(wanted)))
    if wrong:
        raise CacheMismatchError(f"{place}: holds another cache: {'; '.join(wrong)}; choose another destination")


TIME = (1980, 1, 1, 0, 0, 0)


def pack(folder: Path, destination: Path) -> None:
    """Move a cache from a folder into a .zip file, which appears at once and whole; the folder is removed."""
    partial = destination.with_name(f".{destination.name}.partial")
    with partial.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"):
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), TIME)
                entry.external_attr = 0o644 << 16
                entry.file_size = path.stat().st_size
                with path.open("rb") as source, archive.open(entry, "w") as target:
                    shutil.copyfileobj(source, target)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(destination)
    shutil.rmtree(folder)
