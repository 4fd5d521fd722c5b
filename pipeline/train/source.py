"""The source of a run's examples in stage 2: a cache, or a data file with or without a teacher in memory."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.fidelity import BATCH, figures
from logitcask.cache.labels import IntArray, temperature_index
from logitcask.cache.manifest import sha256
from logitcask.cache.reader import CacheReader, matching
from logitcask.cache.report.label_figures import fidelity_of
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.batches.collate import Batch
from logitcask.pipeline.batches.examples import CacheExamples, FileExamples
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device
from logitcask.pipeline.models.fused_loss import TeacherRows
from logitcask.pipeline.models.head import LMHead, keeps_apart, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm, weights_fingerprint
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.examples import Encoder, encode_sources
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.token_table import stage_tokens
from logitcask.pipeline.text.tokenizer import (
    fingerprint,
    has_tokenizer,
    load_tokenizer,
    tokenizer_from_files,
    tokenizer_size,
)


@dataclass(frozen=True)
class OnlineTeacher:
    """A float32 teacher in memory beside the student; the target is its full distribution.

    Meant for small teachers, and as the reference against which a cache is measured.
    """

    model: PreTrainedModel
    head: LMHead
    vocab_size: int  # larger ids are padding of the embedding, not tokens
    packs: bool  # whether examples may share a row
    fingerprint: str  # of its weights

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherRows:
        """Return the teacher's last hidden states at the batch's N target positions, with its head."""
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, enabled=False):
            hidden = last_hidden_states(self.model, ids, batch.get("position_ids"))
        return TeacherRows(hidden.flatten(0, 1)[batch["target_index"]], self.head, self.vocab_size)


@dataclass(frozen=True)
class Source:
    """A run's examples and what is known of them."""

    examples: CacheExamples | FileExamples
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    longest: int  # tokens of the longest example
    temperatures: tuple[float, ...]
    tail: str
    shard_starts: IntArray
    identity: str  # digest of the cache's manifest, or of the data file: a resumed run must have the same
    amount: Amount
    lengths: Callable[[], IntArray]  # tokens per example; of a cache it reads one object per shard
    teacher: OnlineTeacher | None = None


def cache_source(
    cache: str,
    disk_cache: DiskCache,
    *,
    soft: bool,
    temperature: float,
    tail: str | None,
    min_fidelity: float | None,
    same_tokenizer: Mapping[str, Mapping[str, Any]],
    where: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """Open a cache as the source of a run. Raises LogitcaskError if the cache does not fit the run.

    ``soft``: whether the loss needs labels; ``same_tokenizer``: models whose tokenizer, if they bring one, must
    equal the cache's, and how they are loaded; ``where``: the values that the examples must have, by column.
    """
    reader = CacheReader(cache, disk_cache=disk_cache)
    label, data = reader.manifest.label, reader.manifest.data
    tail = tail or label.usual_tail
    if soft:
        j = temperature_index(label.temperatures, temperature)
        if fault := label.tail_fault(tail):
            raise LogitcaskError(f"--tail {tail} {fault[0]}: use --tail {fault[1]}")
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
    tokenizer = _cache_tokenizer(reader, cache, same_tokenizer)
    chosen = matching(reader, where) if where else None
    starts, amount = reader.shard_starts, Amount(data.examples, data.tokens, data.positions)
    shards = range(reader.manifest.shards.count)
    if chosen is not None:
        starts = np.unique(np.searchsorted(chosen, starts))  # shards without such an example are left out
        sums = [int(reader.counts(name, shards)[chosen].sum()) for name in ("token_count", "position_count")]
        amount = Amount(len(chosen), *sums)
        say(f"{cache}: {len(chosen):,} of {data.examples:,} examples are taken")

    def lengths() -> IntArray:
        counts = reader.counts("token_count", shards)
        return counts if chosen is None else counts[chosen]

    return Source(
        examples=CacheExamples(cache, with_targets=soft, disk_cache=disk_cache, opened=reader.opened, chosen=chosen),
        tokenizer=tokenizer,
        vocab_size=label.vocab_size,
        longest=data.longest,
        temperatures=tuple(label.temperatures),
        tail=tail,
        shard_starts=starts,
        identity=cache_identity(reader) + (json.dumps(dict(where)) if where else ""),
        amount=amount,
        lengths=lengths,
    )


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


def file_source(
    reading: Reading,
    folder: Path,
    *,
    student_model: str | None,
    teacher_model: str | None,
    online: bool,
    max_seq_length: int,
    device: str,
    chat_turns: str,
    columns: Mapping[str, str],
    bad: BadRecords,
    loading: Mapping[str, Any] | None = None,
    chat_template: Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Source:
    """Tokenize data files as the source of a run: for output distillation or, if ``online``, with a teacher in memory.

    The tokenizer is the student's if the student is a model, loaded as ``loading`` says, else the teacher's; online
    the two must be equal. Tokens are staged in ``folder``. Raises LogitcaskError if a model or the data cannot be used.
    """
    owner = next((model for model in (student_model, teacher_model) if model and has_tokenizer(model)), None)
    if owner is None:
        raise LogitcaskError("--train-data needs a tokenizer: give --teacher-model (only its tokenizer is loaded)")
    tokenizer = load_tokenizer(owner, **((loading or {}) if owner == student_model else {}))
    set_template(tokenizer, chat_template, chat_template_kwargs or {})
    teacher = None
    if online:
        assert teacher_model is not None
        require_tokenizer(teacher_model, fingerprint(tokenizer), f"--student-model {owner}")
        say(f"teacher {teacher_model} in memory: exact soft labels, recomputed at every step")
        teacher = load_online_teacher(teacher_model, tokenizer_size(tokenizer), choose_device(device))
    encoder = Encoder(tokenizer, prompt_loss=False, turns=chat_turns, columns=columns)
    encoded = encode_sources(encoder, reading.sources, bad, reading)
    table = stage_tokens(
        encoded, folder, max_seq_length=max_seq_length, prompt_loss=False, source=", ".join(reading.sources)
    )
    return Source(
        examples=FileExamples(table),
        tokenizer=tokenizer,
        vocab_size=tokenizer_size(tokenizer),
        longest=int(np.diff(table.starts).max()),
        temperatures=(),
        tail="sampled",
        shard_starts=np.array([0, len(table)], dtype=np.int64),
        identity=table.identity.fingerprint + (teacher.fingerprint if teacher else ""),
        amount=Amount(len(table), int(table.starts[-1]), int(table.positions.sum())),
        lengths=lambda: np.diff(table.starts),
        teacher=teacher,
    )


def require_tokenizer(source: str, wanted: str, cache: str, **loading: Any) -> None:
    """Raise CacheMismatchError if a model's own tokenizer is not the one that the cache was made with."""
    own = fingerprint(load_tokenizer(source, **loading))
    if own != wanted:
        raise CacheMismatchError(
            f"{cache}: was made with another tokenizer than {source}'s: fingerprints {wanted[:12]} and {own[:12]}; "
            "make a cache with a teacher that has the same tokenizer"
        )


def load_online_teacher(source: str, vocab_size: int, device: torch.device) -> OnlineTeacher:
    """Load a teacher onto a device. Raises LogitcaskError if it cannot be loaded or its head cannot be separated."""
    model = load_causal_lm(source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    return OnlineTeacher(model, read_head(model), vocab_size, keeps_apart(model), weights_fingerprint(model))
