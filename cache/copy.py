"""Copying a cache between folders, .zip files and URLs.

Every object is checked against its digest when it is read, and again after it was written. A shard's commit record is
written last, so an interrupted copy is a cache that lacks shards, and the same copy resumes. A .zip file is copied to a
folder beside it first and packed at the end.
"""

import contextlib
import hashlib
import json
import shutil
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
    read_verified,
    shard_keys,
)
from logitcask.cache.layout import shard_specs
from logitcask.cache.manifest import Manifest, PartIdentity, flatten
from logitcask.cache.reader import CacheReader, read_manifest
from logitcask.cache.storage.bounded import MAX_JSON, read_bounded
from logitcask.cache.storage.hub import HubFolder, is_repository
from logitcask.cache.storage.open import (
    delete_objects,
    drop_partial_objects,
    flush_names_above,
    is_empty,
    is_zip,
    open_store,
    write_objects,
)
from logitcask.cache.storage.ownership import explain_write_errors, sole_writer
from logitcask.cache.storage.remote import RemoteStore
from logitcask.cache.storage.staging import scratch_folder
from logitcask.cache.storage.url import is_url
from logitcask.cache.storage.zip import pack
from logitcask.cache.writer import create_cache, is_torn, plan_digest

CARD = "README.md"
COMMIT_SHARDS, COMMIT_BYTES = 50, 1 << 30  # at most, per commit to the hub
AT_ONCE = 8  # objects read or checked at the same time
Objects = dict[str, tuple[str, bytes]]  # key at the destination: key at the source, digest


@dataclass(frozen=True)
class Copied:
    """The shards at the destination: those copied now (``brought``) and those already there (``found``)."""

    brought: int
    found: int
    bytes: int  # written by this copy


def copy_cache(
    source: str, destination: str, shards: tuple[int, int] | None, advance: Callable[[int], None] = lambda shards: None
) -> Copied:
    """Copy a cache, or its shards FIRST to STOP as a separate cache, calling ``advance(1)`` after each shard.

    Either side is a folder, a .zip file or a URL. Raises IncompleteCacheError if the source lacks shards,
    CacheFormatError if it is damaged, CacheMismatchError if another cache is at the destination.
    """
    store = open_store(source, read_only=True)
    opened, manifest = digest(store, "zarr.json"), read_manifest(store, source)
    chosen = _chosen_shards(store, source, manifest.shards.count, shards)
    with contextlib.ExitStack() as stack:
        constants = store
        if len(chosen) < manifest.shards.count:
            folder = stack.enter_context(scratch_folder()) / "part"
            manifest = _write_part_constants(source, chosen, folder)
            constants = open_store(folder, read_only=True)
        job = _Copy(store, opened, constants, manifest, chosen, destination, advance)
        if is_url(destination):
            target = open_store(destination, read_only=False)
            return job.run_on_hub(target) if is_repository(target) else job.run(target)
        stack.enter_context(sole_writer(destination))
        stack.enter_context(explain_write_errors(destination))
        copy = _copy_to_zip if is_zip(destination) else _copy_to_folder
        return copy(job, Path(destination))


def _copy_to_folder(job: "_Copy", folder: Path) -> Copied:
    folder.mkdir(parents=True, exist_ok=True)
    flush_names_above(folder)
    store = open_store(folder, read_only=False)
    drop_partial_objects(store, lambda key: False)
    return job.run(store)


def _copy_to_zip(job: "_Copy", destination: Path) -> Copied:
    """Copy to a folder beside the file, where an interrupted copy resumes, then pack the folder."""
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
        raise LogitcaskError(f"--shards {first}:{stop}: must be FIRST:STOP within 0:{count}, the shards of {source}")
    missing = sorted(set(range(first, stop)) - committed_shards(store, count))
    if missing:
        raise IncompleteCacheError(
            f"{source}: {len(missing)} of the shards {first}:{stop} are not committed, the first is {missing[0]}: "
            "finish the cache, or copy a part of it with --shards FIRST:STOP"
        )
    return range(first, stop)


def _write_part_constants(source: str, chosen: range, folder: Path) -> Manifest:
    """Write the objects outside the shards for a cache of the ``chosen`` shards of ``source``; return its manifest."""
    reader = CacheReader(source, partial=True)
    whole = reader.manifest
    examples = np.diff(reader.shard_starts)[chosen.start : chosen.stop]
    totals = {
        "examples": int(examples.sum()),
        "tokens": int(reader.counts("token_count", chosen).sum()),
        "positions": int(reader.counts("position_count", chosen).sum()),
    }
    before = whole.part or PartIdentity(first=0, of=whole.shards.count)
    manifest = whole.model_copy(
        update={
            "part": PartIdentity(first=before.first + chosen.start, of=before.of),
            "data": whole.data.model_copy(update=totals),
            "shards": whole.shards.model_copy(update={"count": len(chosen), "digest": plan_digest(examples)}),
        }
    )
    head = reader.teacher_head() if whole.teacher_head else None
    create_cache(folder, manifest, examples, reader.tokenizer_files(), head=head)
    return manifest


@dataclass(frozen=True)
class _Copy:
    """A copy of the ``chosen`` shards of ``source``; objects that belong to no shard come from ``constants``."""

    source: Store
    opened: bytes | None  # digest of the source's manifest document
    constants: Store
    manifest: Manifest
    chosen: range
    place: str
    advance: Callable[[int], None]

    def run(self, target: Store) -> Copied:
        """Copy what a store lacks into it; a read-only one must lack nothing."""
        _require_same_cache(target, self.place, self.manifest)
        specs = shard_specs(self.manifest)
        already_there = written = 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for step in self._constant_steps():
                written += self._bring(pool, self.constants, target, step)
            for index, origin in enumerate(self.chosen):
                record = commit_record(self.source, specs, origin)
                commit = commit_key(index), (commit_key(origin), hashlib.sha256(record).digest())
                keys = zip(shard_keys(specs, index), shard_keys(specs, origin), _digests(record), strict=True)
                if not target.read_only and digest(target, commit[0]) != commit[1][1]:
                    delete_objects(target, [commit[0]])
                brought = self._bring(
                    pool, self.source, target, {key: (origin_key, proof) for key, origin_key, proof in keys}
                )
                if digest(self.source, "zarr.json") != self.opened:
                    raise CacheMismatchError(f"{self.place}: its source was replaced by another cache: copy again")
                brought += self._bring(pool, self.source, target, dict([commit]))
                already_there += not brought
                written += brought
                self.advance(1)
        return Copied(len(self.chosen) - already_there, already_there, written)

    def run_on_hub(self, target: RemoteStore) -> Copied:
        """Copy what a repository on the hub lacks into it: its card and the objects outside the shards, then shards."""
        hub = HubFolder(target)
        _require_same_cache(target, self.place, self.manifest)
        specs = shard_specs(self.manifest)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            card = (
                {} if read_bounded(target, CARD, MAX_JSON) else {CARD: dataset_card(self.manifest, self.place).encode()}
            )
            constants = {key: origin for step in self._constant_steps() for key, origin in step.items()}
            hub.stage(card)
            _, written = self._commit(hub, pool, self.constants, [constants], "Add the manifest of a logitcask cache")
            brought = 0
            for start in range(0, len(self.chosen), COMMIT_SHARDS):
                shards = []
                for index in range(start, min(start + COMMIT_SHARDS, len(self.chosen))):
                    origin = self.chosen[index]
                    record = commit_record(self.source, specs, origin)
                    proofs = [*_digests(record), hashlib.sha256(record).digest()]
                    keys = [*shard_keys(specs, index), commit_key(index)]
                    origins = [*shard_keys(specs, origin), commit_key(origin)]
                    shards.append(dict(zip(keys, zip(origins, proofs, strict=True), strict=True)))
                message = f"Add shards {start} to {start + len(shards) - 1} of {len(self.chosen)}"
                shards_now, bytes_now = self._commit(hub, pool, self.source, shards, message)
                brought, written = brought + shards_now, written + bytes_now
                self.advance(len(shards))
        return Copied(brought, len(self.chosen) - brought, written)

    def _commit(
        self, hub: HubFolder, pool: Executor, source: Store, parts: list[Objects], message: str
    ) -> tuple[int, int]:
        """Commit what the hub lacks of some parts, each whole; return how many parts lacked any, and the bytes sent."""
        proofs = {key: proof for part in parts for key, (_, proof) in part.items()}
        there = hub.present(proofs)
        lacking = [{key: origin for key, origin in part.items() if key not in there} for part in parts]
        sent = staged = 0
        for part in filter(None, lacking):
            data = pool.map(lambda origin: read_verified(source, *origin), part.values())
            objects = dict(zip(part, data, strict=True))
            if digest(self.source, "zarr.json") != self.opened:
                raise CacheMismatchError(f"{self.place}: its source was replaced by another cache: copy again")
            hub.stage(objects)
            staged += sum(map(len, objects.values()))
            if staged >= COMMIT_BYTES:
                hub.commit(message)
                sent, staged = sent + staged, 0
        hub.commit(message)
        if lost := proofs.keys() - hub.present(proofs):
            raise CacheFormatError(f"{self.place}: {min(lost)}: bytes differ after they were written: copy again")
        return sum(map(bool, lacking)), sent + staged

    def _constant_steps(self) -> list[Objects]:
        """Return the objects outside the shards in the order to write them.

        The manifest comes first, since it identifies an interrupted copy; then what it describes; then the seal.
        """
        objects = constant_objects(self.manifest)
        sealed = read_bounded(self.constants, SEAL_OBJECTS[1], 32 * len(objects)) or b""
        if len(sealed) != 32 * len(objects):
            raise CacheFormatError(f"{SEAL_OBJECTS[1]}: missing or truncated")
        proofs = {key: (key, proof) for key, proof in zip(objects, _digests(sealed), strict=True)}
        manifest = {"zarr.json": proofs.pop("zarr.json")}
        return [manifest, proofs, {SEAL_OBJECTS[1]: (SEAL_OBJECTS[1], hashlib.sha256(sealed).digest())}]

    def _bring(self, pool: Executor, source: Store, target: Store, objects: Objects) -> int:
        """Write the objects that the target lacks and check them there; return the bytes written."""

        def lacking() -> list[str]:
            digests = pool.map(lambda key: digest(target, key), objects)
            return [key for (key, (_, proof)), have in zip(objects.items(), digests, strict=True) if have != proof]

        wanted = lacking()
        if not wanted:
            return 0
        if target.read_only:
            raise CacheMismatchError(f"{self.place}: {wanted[0]} differs from the source's: remove it and copy again")
        data = list(pool.map(lambda key: read_verified(source, *objects[key]), wanted))
        write_objects(target, dict(zip(wanted, data, strict=True)))
        if wanted := lacking():
            raise CacheFormatError(f"{self.place}: {wanted[0]}: bytes differ after they were written: copy again")
        return sum(map(len, data))


def _digests(joined: bytes) -> list[bytes]:
    return [joined[i : i + 32] for i in range(0, len(joined), 32)]


def _require_same_cache(target: Store, place: str, wanted: Manifest) -> None:
    """Raise CacheFormatError or CacheMismatchError if anything but (part of) this copy is there.

    A copy whose manifest a power cut tore resumes too: each object is compared with its digest anyway.
    """
    if is_empty(target) or (not target.read_only and is_torn(target)):
        return
    mismatches = differences(flatten(dict(read_manifest(target, place))), flatten(dict(wanted)))
    if mismatches:
        raise CacheMismatchError(f"{place}: holds another cache: {'; '.join(mismatches)}; choose another destination")


def dataset_card(manifest: Manifest, url: str) -> str:
    """Return the dataset card of a cache at an hf:// URL: YAML, of which JSON is a part, and Markdown."""
    teacher, data, label = manifest.teacher, manifest.data, manifest.label
    name = teacher.id.replace("`", "'").replace("|", "/")
    sizes = [("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7)]
    size = next((size for size, limit in sizes if data.examples < limit), "10M<n<100M")
    at = ", ".join(f"{t:g}" for t in label.temperatures)
    tail = f"{label.tail_draws} draws from the rest" if label.tail_draws else "no draws from the rest"
    tail = f"the hidden state of width {label.exact.width} in {label.exact.bits} bits" if label.exact else tail
    unknown = f"; unknown: {', '.join(label.unknown)}" if label.unknown else ""
    part = f", from shard {manifest.part.first} of {manifest.part.of}" if manifest.part else ""
    facts = {
        "teacher": f"`{name}`, revision `{teacher.revision or 'none'}`, {teacher.dtype}, by {teacher.engine}",
        "teacher's weights": f"`{teacher.weights}`",
        "tokenizer": f"{label.vocab_size:,} tokens, fingerprint `{manifest.tokenizer.fingerprint}`",
        "data": f"{data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} labelled positions",
        "data's fingerprint": f"`{data.fingerprint}`",
        "label": f"the {label.head_size} most probable tokens, {tail}; for students at temperatures {at}{unknown}",
        "shards": f"{manifest.shards.count}{part}",
    }
    lines = [
        "---",
        f"pretty_name: {json.dumps(f'Soft labels of {name}')}",
        "tags: [logitcask, knowledge-distillation, soft-labels, logits]",
        f"size_categories: [{json.dumps(size)}]",
        "viewer: false",
        "---",
        "",
        f"# Soft labels of `{name}`",
        "",
        f"A Logitcask cache, format {manifest.format_version}: the tokens of a text, and for each position what the",
        "teacher expects next. Students are trained from it without the teacher:",
        "",
        "```sh",
        f"logitcask cache verify {url}",
        f"logitcask train --cache {url} --student-model STUDENT --output-dir run",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        "Where the texts come from and under which licence they may be used is not recorded: add it here.",
    ]
    return "\n".join(lines) + "\n"
