"""Writing a cache of labels from anybody's forward pass. Needs neither torch nor transformers but for a tokenizer.

Examples are gathered into shards, and a shard is written once the next example would not fit. How many there will be is
known only at the end; so shards go into a folder beside the cache's, which takes the cache's name when it is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from logitcask.cache.errors import CacheMismatchError, LogitcaskError, differences
from logitcask.cache.invariants import impossible, inconsistent
from logitcask.cache.labels import Example, IntArray, Shard, SparseTargets
from logitcask.cache.layout import stride_for
from logitcask.cache.manifest import (
    FORMAT_VERSION,
    DataIdentity,
    LabelSettings,
    MadeBy,
    Manifest,
    ShardPlan,
    TeacherIdentity,
    TokenizerIdentity,
    flatten,
)
from logitcask.cache.reader import CacheReader, read_manifest
from logitcask.cache.storage.open import flush_names_above, is_zip, open_store
from logitcask.cache.storage.ownership import explain_write_errors, sole_writer
from logitcask.cache.storage.url import is_url
from logitcask.cache.writer import CacheWriter, create_cache, plan_digest, replace_constants, stored_manifest
from logitcask.library.caches import Cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SHARDS = 1 << 20
TOKENS_PER_POSITION = 4  # of room in a shard
UNKNOWN = "0" * 64  # a digest of what is not known
ENGINE = "logitcask.create"
INTEGERS = ("head_ids", "tail_ids", "tail_counts")


@dataclass(frozen=True)
class _Progress:
    """What has been committed so far."""

    shard_examples: tuple[int, ...] = ()
    tokens: int = 0
    positions: int = 0
    longest: int = 0
    digest: str = ""  # of the examples' tokens and masks, in order

    def with_shard(self, shard: Shard) -> "_Progress":
        digest = self.digest
        ends = np.cumsum(shard.token_count)
        for start, end in zip((ends - shard.token_count).tolist(), ends.tolist(), strict=True):
            ids = shard.input_ids[start:end].astype("<u4").tobytes()
            mask = shard.target_mask[start:end].astype(np.uint8).tobytes()
            digest = hashlib.sha256(digest.encode() + ids + mask).hexdigest()
        return _Progress(
            shard_examples=(*self.shard_examples, len(shard)),
            tokens=self.tokens + len(shard.input_ids),
            positions=self.positions + len(shard.targets),
            longest=max(self.longest, int(shard.token_count.max())),
            digest=digest,
        )


class Writer:
    """Writes a cache example by example; ``logitcask.create`` makes one. ``len(writer)`` counts the examples.

    Left without an error, its ``with`` block completes the cache; left by one, what was added stays for ``resume=True``
    but for the examples of the shard that was not full.
    """

    def __init__(self, path: Path, manifest: Manifest, tokenizer_files: dict[str, bytes], *, resume: bool) -> None:
        """Take the place of the cache, which this process owns, and the manifest of a cache without examples."""
        self.path, self._manifest, self._files = path, manifest, tokenizer_files
        self._folder = unfinished(path)
        self._held: list[Example] = []
        self._held_tokens = self._held_positions = 0
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(sole_writer(path))
        try:
            self._progress = self._begin(resume)
        except BaseException:
            self._stack.close()
            raise
        self._committed, self._closed = sum(self._progress.shard_examples), False

    def __len__(self) -> int:
        return self._committed + len(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            self._closed = True
            self._stack.close()

    def add(self, input_ids: ArrayLike, target_mask: ArrayLike, targets: SparseTargets) -> None:
        """Add an example of L tokens: ``target_mask`` (L,) is true at t if ``targets`` holds the label of token t + 1.

        Raises LogitcaskError if these do not fit each other or the cache, or no teacher can have given the label.
        """
        if self._closed:
            raise LogitcaskError(f"{self.path}: this writer is closed: create another cache")
        example = self._checked(np.asarray(input_ids), np.asarray(target_mask), targets)
        plan, tokens, positions = self._manifest.shards, len(example.input_ids), len(example.targets)
        if tokens > plan.tokens or positions > plan.positions:
            raise LogitcaskError(
                f"{self.path}: example {len(self)} has {tokens:,} tokens and {positions:,} target positions, but a "
                f"shard holds {plan.tokens:,} and {plan.positions:,}: raise shard_positions"
            )
        full = len(self._held) >= plan.examples
        if full or self._held_tokens + tokens > plan.tokens or self._held_positions + positions > plan.positions:
            self._flush()
        self._held.append(example)
        self._held_tokens += tokens
        self._held_positions += positions

    def close(self) -> None:
        """Write the last shard and complete the cache, which then appears at its path."""
        if self._closed:
            return
        with self._stack, explain_write_errors(self.path):
            self._closed = True
            if self._held:
                self._flush()
            if not self._progress.shard_examples:
                shutil.rmtree(self._folder)
                raise LogitcaskError(f"{self.path}: not written: no example was added")
            counts = np.array(self._progress.shard_examples, dtype=np.int64)
            replace_constants(self._folder / "cache", self._final_manifest(counts), counts, self._files)
            CacheReader(self._folder / "cache")
            self._take_place()

    def _begin(self, resume: bool) -> _Progress:
        """Create the folder of the unfinished cache, or open the one that is there; return what it holds."""
        staged = self._folder / "cache"
        if self._folder.exists() and not resume:
            shutil.rmtree(self._folder)
        if not (self._folder / "progress.json").exists():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            nothing = np.zeros(self._manifest.shards.count, dtype=np.int64)
            create_cache(staged, self._manifest, nothing, self._files)
            self._record(_Progress())
        stored = read_manifest(open_store(staged, read_only=True), str(self.path))
        mismatches = differences(_given(stored), _given(self._manifest), "the unfinished cache")
        if mismatches:
            raise CacheMismatchError(f"{self.path}: cannot be resumed: {'; '.join(mismatches)}")
        if stored != self._manifest:  # it was about to be completed
            nothing = np.zeros(self._manifest.shards.count, dtype=np.int64)
            replace_constants(staged, self._manifest, nothing, self._files)
        made_by = MadeBy(engine=ENGINE, device="", versions={"logitcask": version("logitcask")})
        self._writer = CacheWriter(staged, self._manifest, made_by=made_by)
        record = json.loads((self._folder / "progress.json").read_text())
        return _Progress(**{**record, "shard_examples": tuple(record["shard_examples"])})

    def _record(self, progress: _Progress) -> None:
        partial = self._folder / "progress.json.partial"
        partial.write_text(json.dumps(asdict(progress)))
        partial.replace(self._folder / "progress.json")

    def _flush(self) -> None:
        """Write the held examples as a shard, then note that it is there."""
        shard = Shard.of(self._held)
        self._writer.write_shard(len(self._progress.shard_examples), shard)
        self._progress = self._progress.with_shard(shard)
        self._record(self._progress)
        self._committed += len(self._held)
        self._held, self._held_tokens, self._held_positions = [], 0, 0

    def _final_manifest(self, counts: IntArray) -> Manifest:
        done = self._progress
        data = DataIdentity(
            fingerprint=done.digest,
            examples=int(counts.sum()),
            tokens=done.tokens,
            positions=done.positions,
            truncated=0,
            dropped=0,
            max_seq_length=done.longest,
            longest=done.longest,
            prompt_loss=False,
        )
        shards = self._manifest.shards.model_copy(update={"count": len(counts), "digest": plan_digest(counts)})
        return self._manifest.model_copy(update={"data": data, "shards": shards})

    def _take_place(self) -> None:
        """Put the complete cache into its place; an older one that it replaces is removed afterwards."""
        old = self._folder / "old"
        if self.path.exists():
            self.path.rename(old)
        (self._folder / "cache").rename(self.path)
        flush_names_above(self.path)
        shutil.rmtree(self._folder)

    def _checked(self, ids: Any, mask: Any, targets: SparseTargets) -> Example:
        """Return the example in the cache's types. Raises LogitcaskError if it does not fit."""
        label, where = self._manifest.label, f"{self.path}: example {len(self)}"
        if ids.ndim != 1 or mask.shape != ids.shape or ids.dtype.kind not in "iu" or not len(ids):
            raise LogitcaskError(f"{where}: input_ids and target_mask must be (L,), got {ids.shape} and {mask.shape}")
        if mask.dtype.kind not in "biu" or not np.isin(mask, (0, 1)).all() or mask[-1] or not mask.any():
            raise LogitcaskError(f"{where}: target_mask must be boolean, somewhere true, and false at the last token")
        if int(ids.min()) < 0 or int(ids.max()) >= label.vocab_size:
            raise LogitcaskError(f"{where}: input_ids must be 0 to {label.vocab_size - 1}, got {int(ids.max())}")
        n, k, m, j = int(mask.sum()), label.head_size, label.tail_draws, len(label.temperatures)
        wanted = dict(
            zip(SparseTargets.names(), ((n, k), (n, k), (n, m), (n, m), (n, m), (n, j), (n, j), (n,)), strict=True)
        )
        arrays = {name: np.asarray(getattr(targets, name)) for name in SparseTargets.names()}
        for name, shape in wanted.items():
            if arrays[name].shape != shape:
                raise LogitcaskError(f"{where}: targets.{name} must have the shape {shape}, got {arrays[name].shape}")
        typed: dict[str, Any] = {
            name: values.astype(np.int64 if name in INTEGERS else np.float32) for name, values in arrays.items()
        }
        sound = SparseTargets(**typed)
        for name in ("head_ids", "tail_ids"):
            values = getattr(sound, name)
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < label.vocab_size:
                raise LogitcaskError(f"{where}: targets.{name} must be 0 to {label.vocab_size - 1}")
        example = Example(ids.astype(np.int64), mask.astype(bool), sound)
        flaw = impossible(sound, label)
        problems = [f"row {flaw[0]}: {flaw[1]}"] if flaw else inconsistent(Shard.of([example]), label)
        if problems:
            raise LogitcaskError(f"{where}: its label is impossible: {problems[0]}")
        return example


def create(
    path: str | Path,
    *,
    label: LabelSettings,
    tokenizer: "str | Cache | PreTrainedTokenizerBase",
    teacher: str = "unknown",
    teacher_revision: str = "",
    shard_positions: int = 65_536,
    resume: bool = False,
    overwrite: bool = False,
) -> Writer:
    """Create a cache in a folder for labels of your own, complete when its ``with`` block ends.

        with logitcask.create("out", label=label, tokenizer="org/teacher", teacher="org/teacher") as writer:
            for input_ids, target_mask, logits in forward_passes():
                gold = input_ids[1:][target_mask[:-1]]
                writer.add(input_ids, target_mask, logitcask.sparsify(logits, gold, label, example=len(writer)))

    ``tokenizer`` is one, a model's hub id or folder, or an open cache (then transformers is not needed). The order in
    which examples are added is that of the first epoch with seed 0, so add them in random order. A program that was
    killed continues with ``resume=True``: add the examples from ``len(writer)`` on.
    Raises LogitcaskError if anything is at the path, unless ``overwrite`` and it is a cache.
    """
    if is_url(path) or is_zip(path):
        raise LogitcaskError(f"{path}: create writes to a folder: give one, then use logitcask cache copy")
    if label.exact:
        raise LogitcaskError(
            "create: exact labels need the teacher's head and a basis fitted to it: make them with "
            "logitcask precompute-logits --preset exact"
        )
    if label.fidelity_positions:
        raise LogitcaskError("create: there is no certificate for labels of your own: use fidelity_positions=0")
    place = Path(os.path.abspath(path))
    if place.exists() and any(place.iterdir() if place.is_dir() else [place]) and not overwrite:
        raise LogitcaskError(f"{path}: already exists: choose another place, or pass overwrite=True to replace a cache")
    if overwrite:
        stored_manifest(place, overwrite=True)  # refuses anything but a cache
    if unfinished(place).exists() and not (resume or overwrite):
        raise LogitcaskError(
            f"{path}: an unfinished cache is there: continue it with resume=True, adding the examples from len(writer) "
            "on, or drop it with overwrite=True"
        )
    identity, files = _tokenizer(tokenizer)
    manifest = _empty_manifest(label, identity, teacher, teacher_revision, shard_positions)
    return Writer(place, manifest, files, resume=resume)


def _given(manifest: Manifest) -> dict[str, object]:
    """Return what of a manifest is known before the examples, by dotted name."""
    counted = ("data", "shards.count", "shards.digest")
    return {name: value for name, value in flatten(dict(manifest)).items() if not name.startswith(counted)}


def unfinished(path: Path) -> Path:
    """Return the folder of a cache that is not complete yet, beside its own."""
    return path.parent / f".{path.name}.unfinished"


def _tokenizer(tokenizer: "str | Cache | PreTrainedTokenizerBase") -> tuple[TokenizerIdentity, dict[str, bytes]]:
    """Return a tokenizer's identity and its files by name."""
    if isinstance(tokenizer, Cache):
        return tokenizer.reader.manifest.tokenizer, tokenizer.reader.tokenizer_files()
    from logitcask.pipeline.text.tokenizer import identify, load_tokenizer, tokenizer_files

    loaded = load_tokenizer(str(tokenizer)) if isinstance(tokenizer, (str, Path)) else tokenizer
    files = tokenizer_files(loaded)
    return identify(loaded, files), files


def _empty_manifest(
    label: LabelSettings, tokenizer: TokenizerIdentity, teacher: str, revision: str, shard_positions: int
) -> Manifest:
    """Return the manifest of a cache without examples, with room for as many shards as there can be."""
    from pydantic import ValidationError

    if shard_positions < 1:
        raise LogitcaskError(f"create: shard_positions must be at least 1, got {shard_positions}")
    strides: dict[str, int] = {
        "examples": stride_for("example", min(shard_positions, 1 << 16)),
        "tokens": stride_for("token", TOKENS_PER_POSITION * shard_positions),
        "positions": stride_for("position", shard_positions),
    }
    data = DataIdentity(
        fingerprint=UNKNOWN,
        examples=0,
        tokens=0,
        positions=0,
        truncated=0,
        dropped=0,
        max_seq_length=0,
        longest=strides["tokens"],
        prompt_loss=False,
    )
    try:
        return Manifest(
            format_version=FORMAT_VERSION,
            teacher=TeacherIdentity(id=teacher, revision=revision, weights=UNKNOWN, dtype="unknown", engine=ENGINE),
            tokenizer=tokenizer,
            data=data,
            label=label,
            shards=ShardPlan(count=MOST_SHARDS, digest=UNKNOWN, **strides),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "shard_positions"
        raise LogitcaskError(f"create: {place}: {problem['msg']}") from error
