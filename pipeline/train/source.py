"""Where the examples of stage 2 come from: a cache, or a data file with or without a teacher in memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.fidelity import BATCH, figures
from logitcask.cache.labels import IntArray, temperature_index
from logitcask.cache.manifest import LabelSettings, sha256
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.label_figures import fidelity_of
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device
from logitcask.pipeline.models.fused_loss import TeacherRows
from logitcask.pipeline.models.head import LMHead, keeps_apart, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm, weights_fingerprint
from logitcask.pipeline.models.student_memory import Amount
from logitcask.pipeline.text.examples import Encoder, encode_source
from logitcask.pipeline.text.token_table import stage_tokens
from logitcask.pipeline.text.tokenizer import fingerprint, load_tokenizer, tokenizer_from_files, tokenizer_size
from logitcask.pipeline.train.batches import Batch, CacheExamples, FileExamples


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher in float32, in memory beside the student: its full distribution is the target.

    For small teachers, and as the reference that a cache is measured against.
    """

    model: PreTrainedModel
    head: LMHead
    vocab_size: int  # ids beyond it are no tokens
    packs: bool  # whether examples may share a row
    fingerprint: str  # of the weights

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherRows:
        """What the teacher's head sees at the batch's N target positions, and the head."""
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, enabled=False):
            hidden = last_hidden_states(self.model, ids, batch.get("position_ids"))
        return TeacherRows(hidden.flatten(0, 1)[batch["target_index"]], self.head, self.vocab_size)


@dataclass(frozen=True)
class Source:
    """Where a run's examples come from."""

    examples: CacheExamples | FileExamples
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    longest: int  # tokens of the longest example
    temperatures: tuple[float, ...]
    tail: str
    shard_starts: IntArray
    identity: str  # of the cache's manifest, or of the data if there is none: tells runs apart
    amount: Amount
    lengths: Callable[[], IntArray]  # tokens of each example; reads one object per shard
    teacher: OnlineTeacher | None = None


def cache_source(
    cache: str,
    disk_cache: DiskCache,
    *,
    soft: bool,
    temperature: float,
    tail: str | None,
    min_fidelity: float | None,
    same_tokenizer: Iterable[str],
) -> Source:
    """A cache as the source of a run. Raises LogitcaskError if it does not fit what is asked of it.

    ``soft``: whether the loss needs labels; ``same_tokenizer``: models whose tokenizer must be the cache's.
    """
    reader = CacheReader(cache, disk_cache=disk_cache)
    label, data = reader.manifest.label, reader.manifest.data
    tail = tail or ("sampled" if label.tail_draws else "bucket")
    if soft:
        j = temperature_index(label.temperatures, temperature)
        _require_tail(label, tail)
        if tail == "renormalize":
            captured = float(-np.expm1(reader.shard(0).targets.log_tail_mass[:, j].astype(np.float64)).mean())
            say(
                f"tail renormalize: the head holds {captured:.1%} of the teacher's mass at this temperature; "
                "the rest is ignored and the student is pulled away from the teacher"
            )
        if min_fidelity is not None:
            require_fidelity(reader, j, min_fidelity)
    tokenizer = tokenizer_from_files(reader.tokenizer_files())
    for model in same_tokenizer:
        require_tokenizer(model, reader.manifest.tokenizer.fingerprint, cache)
    return Source(
        examples=CacheExamples(cache, with_targets=soft, disk_cache=disk_cache),
        tokenizer=tokenizer,
        vocab_size=label.vocab_size,
        longest=data.longest,
        temperatures=tuple(label.temperatures),
        tail=tail,
        shard_starts=reader.shard_starts,
        identity=sha256(reader.manifest.model_dump_json().encode()),
        amount=Amount(data.examples, data.tokens, data.positions),
        lengths=lambda: reader.counts("token_count", range(reader.manifest.shards.count)),
    )


def _require_tail(label: LabelSettings, tail: str) -> None:
    if tail != "sampled" and label.head_size == 0:
        raise LogitcaskError(f"--tail {tail} needs a head, the cache has head size 0: use --tail sampled")
    if tail == "sampled" and label.tail_draws == 0 and label.head_size < label.vocab_size:
        raise LogitcaskError("--tail sampled needs draws, the cache has none: use --tail bucket")


def require_fidelity(reader: CacheReader, j: int, wanted: float) -> None:
    """Raise LogitcaskError if the cache's certificate at temperature j is below the wanted cosine, or missing."""
    temperatures = reader.manifest.label.temperatures
    sums = fidelity_of(reader, range(reader.manifest.shards.count))
    measured = figures(sums, len(temperatures))
    if measured is None:
        raise LogitcaskError(
            f"--min-fidelity {wanted}: {reader.path} was measured on {sums.positions:g} positions, too few: make it "
            "with more --fidelity-positions, or leave this option out"
        )
    cosine = measured[j][0].cosine
    if cosine < wanted:
        raise LogitcaskError(
            f"--min-fidelity {wanted}: not good enough: at T={temperatures[j]:g} the cosine of {reader.path}'s "
            f"gradient to the exact one is {cosine:.4f} over {BATCH} positions: take a richer --preset in stage 1, "
            "another --temperature, or ask for less"
        )


def file_source(
    train_data: str,
    folder: Path,
    *,
    student_model: str | None,
    teacher_model: str | None,
    online: bool,
    max_seq_length: int,
    device: str,
) -> Source:
    """A data file as the source, for output distillation or, ``online``, with the teacher in memory.

    The tokenizer is the student's, or the teacher's; online they must be the same. Its tokens are staged in
    ``folder``. Raises LogitcaskError if a model or the data cannot be used.
    """
    owner = student_model or teacher_model
    if owner is None:
        raise LogitcaskError("--train-data needs a tokenizer: give --teacher-model, only its tokenizer is loaded")
    tokenizer = load_tokenizer(owner)
    teacher = None
    if online:
        assert teacher_model is not None
        require_tokenizer(teacher_model, fingerprint(tokenizer), f"--student-model {owner}")
        say(f"teacher {teacher_model} in memory: exact soft labels, made again at every step")
        teacher = load_online_teacher(teacher_model, tokenizer_size(tokenizer), choose_device(device))
    encoded = encode_source(Encoder(tokenizer, prompt_loss=False), train_data)
    table = stage_tokens(encoded, folder, max_seq_length=max_seq_length, prompt_loss=False, source=train_data)
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


def require_tokenizer(source: str, wanted: str, cache: str) -> None:
    """Raise CacheMismatchError if a model's own tokenizer is not the one the cache was made with."""
    own = fingerprint(load_tokenizer(source))
    if own != wanted:
        raise CacheMismatchError(
            f"{cache}: was made with another tokenizer than {source}'s: fingerprints {wanted[:12]} and {own[:12]}; "
            "make a cache with a teacher of the same tokenizer"
        )


def load_online_teacher(source: str, vocab_size: int, device: torch.device) -> OnlineTeacher:
    """A teacher on a device. Raises LogitcaskError if it cannot be loaded, or its logits cannot be taken apart."""
    model = load_causal_lm(source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    return OnlineTeacher(model, read_head(model), vocab_size, keeps_apart(model), weights_fingerprint(model))
