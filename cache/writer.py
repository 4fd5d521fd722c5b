"""Writing a cache: create it or resume it, then write its shards, each committed last.

``stored_manifest`` refuses a place that holds anything else, ``create_cache`` writes what belongs to no shard, and
``CacheWriter`` the shards. A shard without a commit record does not exist for readers.

A power cut leaves a cache that the same command finishes: the manifest is on the disk before the other constants, those
before the seal, the seal before the first shard. An old cache that is replaced loses its commit records first; its
manifest stays until the new one takes its place.
"""

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore

from logitcask.cache.errors import CacheFormatError, CacheMismatchError, differences
from logitcask.cache.exact.head import GROUP, TeacherHead, layouts
from logitcask.cache.integrity import (
    SEAL_OBJECTS,
    commit_key,
    committed_shards,
    constant_damage,
    constant_layout,
    constant_objects,
    digest,
    digests,
    shard_keys,
    write_seal,
)
from logitcask.cache.invariants import require_possible
from logitcask.cache.labels import Shard
from logitcask.cache.layout import ARRAYS, encode_made_by, encode_targets, shard_specs, strides, zarr_layout
from logitcask.cache.manifest import ATTRIBUTE, HeadIdentity, MadeBy, Manifest, identity, sha256
from logitcask.cache.reader import read_manifest
from logitcask.cache.storage.bounded import MAX_JSON, read_bounded, read_json
from logitcask.cache.storage.open import (
    drop_partial_objects,
    flush_names_above,
    flush_objects,
    is_empty,
    list_objects,
    open_store,
    remove_objects,
    write_objects,
)
from logitcask.cache.storage.ownership import explain_write_errors, in_turn, watch_folder
from logitcask.cache.storage.url import is_url

OWN_KEYS = re.compile(
    rf"zarr\.json|(commits|seal|shard_examples|tokenizer|head|{'|'.join(ARRAYS)})/zarr\.json"
    rf"|(commits|{'|'.join(ARRAYS)})/c/[0-9]+(/0)?|shard_examples/c/0|seal/c/0/0"
    r"|tokenizer/[^/]+/(zarr\.json|c/0)|head/[a-z_]+/(zarr\.json|c/[0-9]+(/0)?)|.*\.partial"
)  # of a cache's objects, whatever its manifest


class CacheWriter:
    """Writes shards of a cache that ``create_cache`` created. Several processes may write different shards at once."""

    def __init__(
        self,
        path: str | Path,
        manifest: Manifest,
        *,
        shards: Collection[int] | None = None,
        made_by: MadeBy | None = None,
    ) -> None:
        """Open a cache for writing ``shards``, all of them by default, each with a record of what labelled it."""
        self.path, self.manifest, self._made_by = path, manifest, made_by
        self._shards = set(range(manifest.shards.count) if shards is None else shards)
        self._specs = shard_specs(manifest)
        zarr.config.set({"array.write_empty_chunks": True})
        with explain_write_errors(path):
            self._store = open_store(path, read_only=False)
            root = zarr.open_group(self._store, mode="r+", zarr_format=3)
            self._arrays = {name: require_array(root, name) for name in ("commits", *(s.name for s in self._specs))}
            self._require_folder = watch_folder(path)

    def missing_shards(self) -> list[int]:
        """Return this writer's shards that are not committed yet, in order."""
        return sorted(self._shards - committed_shards(self._store, self.manifest.shards.count))

    def write_shard(self, index: int, shard: Shard) -> None:
        """Write every object of a shard, then its commit record. Raises LogitcaskError if a label is impossible."""
        require_possible(index, shard, self.manifest)
        plan = self.manifest.shards
        values: dict[str, Any] = {
            "token_count": shard.token_count,
            "position_count": shard.position_count,
            "input_ids": shard.input_ids,
            "target_mask": shard.target_mask,
            **encode_targets(shard.targets, self.manifest.label),
            **shard.metadata,
        }
        if self.manifest.label.fidelity_positions:
            assert shard.fidelity is not None, "the manifest promises a certificate"
            values["fidelity"] = shard.fidelity.row[None]
        if self.manifest.teacher_tokenizer:
            assert shard.projection is not None, "labels in another vocabulary come with their sums"
            values["projection"] = shard.projection[None]
        if "made_by" in self._arrays:
            values["made_by"] = encode_made_by(self._made_by)[None]
        stride = strides(plan)
        keys = shard_keys(self._specs, index)
        with explain_write_errors(self.path):
            self._require_folder()
            for spec in self._specs:
                array, length = self._arrays[spec.name], stride[spec.axis]
                whole = np.zeros((length, *array.shape[1:]), dtype=spec.dtype)
                whole[: len(values[spec.name])] = values[spec.name]
                array[index * length : (index + 1) * length] = whole
            flush_objects(self._store, keys)
            self._require_folder()
            self._arrays["commits"][index] = digests(self._store, keys).reshape(-1)
            flush_objects(self._store, [commit_key(index)])
            self._require_folder()


def create_cache(
    path: str | Path,
    manifest: Manifest,
    shard_examples: NDArray[np.int64],
    tokenizer_files: dict[str, bytes],
    *,
    head: TeacherHead | None = None,
    overwrite: bool = False,
    shards: Collection[int] | None = None,
) -> CacheWriter:
    """Create a cache, or resume one that is the same but for what a manifest only reports; return its writer.

    The writer's manifest is that of the cache, and so is the teacher's ``head``, which exact labels need: a cache that
    is resumed keeps its own. ``shards`` limits the writer to some shards while other processes write the rest, each
    under ``sole_writer`` of its part. Raises CacheMismatchError, listing every difference, if another cache is there,
    and CacheFormatError if anything else is, or a damaged cache that this run cannot complete.
    """
    alone = shards is None

    def create() -> CacheWriter:
        stored = stored_manifest(path, overwrite=overwrite)
        if stored and not overwrite:
            require_same(path, stored, dict(manifest))
        store = open_store(path, read_only=False)
        drop_partial_objects(store, lambda key: not alone and _belongs_to_others(key, shards or ()))
        if overwrite:
            _clear(store)
            stored = None
        if isinstance(store, LocalStore):
            store.root.mkdir(parents=True, exist_ok=True)
            flush_names_above(store.root)
        made = functools.partial(_constants, shard_examples=shard_examples, tokenizer_files=tokenizer_files, head=head)
        return CacheWriter(path, _settle_constants(store, str(path), stored, manifest, made), shards=shards)

    with explain_write_errors(path):
        return create() if alone else in_turn(path, create)


def replace_constants(
    path: str | Path, manifest: Manifest, shard_examples: NDArray[np.int64], tokenizer_files: dict[str, bytes]
) -> None:
    """Write anew what belongs to no shard, of a cache that was begun with another number of shards.

    The strides and the label must be the same: then the shards' own objects are as the new manifest describes them.
    """
    with explain_write_errors(path):
        store = open_store(path, read_only=False)
        _write_constants(store, _constants(manifest, shard_examples, tokenizer_files))


def stored_manifest(path: str | Path, *, overwrite: bool) -> Manifest | None:
    """Return the manifest of the cache at a path where a cache is to be written; None if there is none.

    There is none either in what a killed run or a power cut left of a cache. Raises CacheFormatError if anything but a
    cache is there, or, unless ``overwrite``, one of a format that cannot be resumed.
    """
    if not is_url(path) and not Path(path).exists():
        return None
    store = open_store(path, read_only=True)
    if is_empty(store):
        return None
    try:
        return read_manifest(store, str(path))
    except CacheFormatError:
        if is_torn(store) or (overwrite and ATTRIBUTE in _attributes(store)):
            return None
        raise


def is_torn(store: Store) -> bool:
    """Return whether a store holds a cache's objects, nothing else, and no legible group document."""
    try:
        legible = read_json(store, "zarr.json") is not None
    except CacheFormatError:
        legible = False
    return not legible and all(OWN_KEYS.fullmatch(key) for key in list_objects(store, ""))


def require_same(path: str | Path, stored: Manifest, wanted: Mapping[str, Any]) -> None:
    """Raise CacheMismatchError, listing every difference, unless a run with these parts of a manifest may resume it."""
    parts = {name: value for name, value in dict(stored).items() if name in wanted}
    mismatches = differences(identity(parts), identity(wanted))
    if mismatches:
        dated = any(line.startswith("data.date: cache has '") for line in mismatches)
        again = ", or run the same command again, which takes the cache's date" if dated else ""
        raise CacheMismatchError(
            f"{path}: holds a cache made from other inputs: {'; '.join(mismatches)}; "
            f"choose another --output or pass --overwrite{again}"
        )


def plan_digest(shard_examples: NDArray[np.int64]) -> str:
    """Return the digest of a shard plan (examples per shard), as the manifest stores it."""
    return sha256(shard_examples.astype("<i8").tobytes())


def require_array(root: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array that is known to exist."""
    array = root[name]
    assert isinstance(array, zarr.Array)
    return array


def _attributes(store: Store) -> Collection[str]:
    with contextlib.suppress(CacheFormatError):
        attributes = (read_json(store, "zarr.json") or {}).get("attributes")
        return attributes if isinstance(attributes, dict) else ()
    return ()


def _belongs_to_others(key: str, mine: Collection[int]) -> bool:
    """Return whether a partial object belongs to a shard that another process may be writing now."""
    name, *rest = key.split("/")
    return rest[:1] == ["c"] and name in {"commits", *ARRAYS} and int(rest[1].split(".")[0]) not in mine


def _clear(store: Store) -> None:
    """Remove the objects of a cache, commit records first, but its manifest; leave any other file alone."""
    keys = sorted(key for key in list_objects(store, "") if OWN_KEYS.fullmatch(key) and key != "zarr.json")
    commits = [key for key in keys if key.startswith("commits/c/")]
    for step in (commits, sorted(set(keys) - set(commits))):
        if step:
            remove_objects(store, step)


def _settle_constants(
    store: Store,
    place: str,
    stored: Manifest | None,
    wanted: Manifest,
    make: Callable[[Manifest], dict[str, bytes]],
) -> Manifest:
    """Write what is missing or damaged of the objects outside the shards; return the manifest that is there then.

    ``make`` returns them all. Raises CacheFormatError if shards are committed and this run would write other objects
    than those that are lost.
    """
    same_files = stored is not None and _made_files(stored) == _made_files(wanted)
    if stored and not constant_damage(store, constant_objects(stored)):
        return stored
    if not (committed_shards(store, stored.shards.count) if stored else list_objects(store, "commits/c/")):
        if not stored:
            _clear(store)  # it may be of another cache
        manifest = stored if stored and same_files else wanted
        _write_constants(store, make(manifest))
        return manifest
    manifest = stored or wanted
    made = make(manifest)
    objects = constant_objects(manifest)
    sealed = read_bounded(store, SEAL_OBJECTS[1], MAX_JSON) or b""
    if len(sealed) == 32 * len(objects):
        proofs = {key: sealed[32 * i : 32 * i + 32] for i, key in enumerate(objects)}
        lost = {key: made.get(key, b"") for key in objects if digest(store, key) != proofs[key]}
        unproven = [key for key, data in lost.items() if hashlib.sha256(data).digest() != proofs[key]]
    else:
        lost = {key: data for key, data in made.items() if digest(store, key) != hashlib.sha256(data).digest()}
        unproven = ([] if stored else ["zarr.json"]) + ([] if same_files else [SEAL_OBJECTS[1]])
    if unproven:
        raise CacheFormatError(
            f"{place}: {unproven[0]} is missing or damaged, and this run would write another one: run the command that "
            "made the cache where it was made, copy the object from a good copy, or pass --overwrite"
        )
    _write_constants(store, lost)
    return manifest


def _made_files(manifest: Manifest) -> tuple[dict[str, str], HeadIdentity | None]:
    """Return the digests of what a cache keeps of its tokenizer and its teacher."""
    return manifest.tokenizer.files, manifest.teacher_head


def _write_constants(store: Store, objects: Mapping[str, bytes]) -> None:
    """Write objects outside the shards durably: the manifest, then what it describes, then the seal."""
    first, last = "zarr.json", SEAL_OBJECTS[1]
    between = [key for key in objects if key not in (first, last)]
    for step in ([first], between, [last]):
        if chosen := {key: objects[key] for key in step if key in objects}:
            write_objects(store, chosen)


def _constants(
    manifest: Manifest,
    shard_examples: NDArray[np.int64],
    tokenizer_files: dict[str, bytes],
    head: TeacherHead | None = None,
) -> dict[str, bytes]:
    """Return the objects outside the shards, by key in the order of the seal, whose content comes last."""
    memory, specs = MemoryStore(), shard_specs(manifest)
    attributes: dict[str, Any] = {ATTRIBUTE: manifest.model_dump(mode="json")}
    with zarr.config.set({"array.write_empty_chunks": True}):  # the seal holds the digests of objects of zeros too
        root = zarr.open_group(memory, mode="w", zarr_format=3, attributes=attributes)
        for spec in specs:
            root.create_array(spec.name, **zarr_layout(spec, manifest.shards), fill_value=0)
        width = 32 * len(specs)
        root.create_array(
            "commits",
            shape=(manifest.shards.count, width),
            chunks=(1, width),
            dtype="uint8",
            compressors=None,
            fill_value=0,
            dimension_names=("shard", "byte"),
            attributes={"meaning": "SHA-256 of each object of the shard", "arrays": [spec.name for spec in specs]},
        )
        _constant(root, "shard_examples", shard_examples.astype("<i8"))
        names = [name for name in manifest.tokenizer.files if name in tokenizer_files]
        for name in names:
            _constant(root, f"tokenizer/{name}", np.frombuffer(tokenizer_files[name], dtype=np.uint8))
        if manifest.teacher_head:
            assert head is not None, "exact labels need the teacher's head"
            group, parts = root.create_group(GROUP), head.arrays()
            for name, layout in layouts(manifest.label, manifest.teacher_head).items():
                part: zarr.Array[Any] = group.create_array(name, **layout)
                fits = parts[name].shape == part.shape  # or it was fitted anew and is another, as its digest shows
                part[:] = parts[name] if fits else np.resize(parts[name], part.shape)
        objects = constant_objects(manifest, names)
        write_seal(root, objects)
    return {key: memory._store_dict[key].to_bytes() for key in (*objects, SEAL_OBJECTS[1])}


def _constant(root: zarr.Group, name: str, data: NDArray[Any]) -> None:
    """Write a small array in one object."""
    array: zarr.Array[Any] = root.create_array(name, **constant_layout(len(data), data.dtype.name))
    array[:] = data
