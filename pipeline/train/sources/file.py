"""Data files as the source of a run's examples in stage 2, with or without a teacher in memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.examples import FileExamples
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device
from logitcask.pipeline.models.head import keeps_apart, read_head
from logitcask.pipeline.models.load import load_causal_lm, weights_fingerprint
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.tokenizer import (
    fingerprint,
    has_tokenizer,
    load_tokenizer,
    require_tokenizer,
    tokenizer_size,
)
from logitcask.pipeline.text.tokens.stage import stage_tokens
from logitcask.pipeline.text.tokens.workers import processes, usual_workers
from logitcask.pipeline.train.sources.source import OnlineTeacher, Source


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
    return text_source(
        reading,
        folder,
        tokenizer,
        max_seq_length=max_seq_length,
        chat_turns=chat_turns,
        columns=columns,
        bad=bad,
        teacher=teacher,
    )


def text_source(
    reading: Reading,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    chat_turns: str,
    columns: Mapping[str, str],
    bad: BadRecords,
    teacher: OnlineTeacher | None = None,
) -> Source:
    """Tokenize data files into ``folder`` as a source without stored labels; what a killed run did there is taken.

    Raises LogitcaskError if a file is bad.
    """
    encoder = Encoder(tokenizer, prompt_loss=False, turns=chat_turns, columns=columns)
    table = stage_tokens(
        encoder,
        reading.sources,
        folder,
        bad=bad,
        max_seq_length=max_seq_length,
        records=reading,
        workers=processes(max(1, usual_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))),
        resumable=True,
    )
    return Source(
        name=", ".join(reading.sources),
        examples=FileExamples(table),
        tokenizer=tokenizer,
        vocab_size=tokenizer_size(tokenizer),
        longest=int(np.diff(table.starts).max()),
        temperatures=(),
        tail="sampled",
        head_size=0,
        labelled=False,
        shard_starts=np.array([0, len(table)], dtype=np.int64),
        identity=table.identity.fingerprint + (teacher.fingerprint if teacher else ""),
        amount=Amount(len(table), int(table.starts[-1]), int(table.positions.sum())),
        lengths=lambda: np.diff(table.starts),
        positions=lambda: table.positions.astype(np.int64),
        teacher=teacher,
    )


def load_online_teacher(source: str, vocab_size: int, device: torch.device) -> OnlineTeacher:
    """Load a teacher onto a device. Raises LogitcaskError if it cannot be loaded or its head cannot be separated."""
    model = load_causal_lm(source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    return OnlineTeacher(model, read_head(model), vocab_size, keeps_apart(model), weights_fingerprint(model))
