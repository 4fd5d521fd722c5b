"""Data files as the source of a run's examples in stage 2, with or without a teacher in memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.examples import FileExamples
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.token_table import TokenTable
from logitcask.pipeline.text.tokenizer import (
    fingerprint,
    has_tokenizer,
    load_tokenizer,
    tokenizer_size,
)
from logitcask.pipeline.text.tokens.stage import stage_tokens
from logitcask.pipeline.text.tokens.workers import processes, usual_workers
from logitcask.pipeline.train.sources.source import Source, TeacherInMemory
from logitcask.pipeline.train.sources.teacher import TranslatedTeacher, load_online_teacher
from logitcask.pipeline.vocabulary.alignment import kinds_line, shared_starts
from logitcask.pipeline.vocabulary.pairs import PairEncoder, set_templates
from logitcask.pipeline.vocabulary.rests import make_bridge, table_folder
from logitcask.pipeline.vocabulary.spread import spread_counted


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

    The tokenizer is the student's if the student is a model, loaded as ``loading`` says, else the teacher's. If they
    differ online, the teacher's distributions are brought to the student's vocabulary. Tokens are staged in ``folder``.
    Raises LogitcaskError if a model or the data cannot be used.
    """
    owner = next((model for model in (student_model, teacher_model) if model and has_tokenizer(model)), None)
    if owner is None:
        raise LogitcaskError("--train-data needs a tokenizer: give --teacher-model (only its tokenizer is loaded)")
    tokenizer = load_tokenizer(owner, **((loading or {}) if owner == student_model else {}))
    other = load_tokenizer(teacher_model) if online and teacher_model not in (None, owner) else tokenizer
    options: dict[str, Any] = {"prompt_loss": False, "turns": chat_turns, "columns": columns}
    if fingerprint(other) == fingerprint(tokenizer):
        set_template(tokenizer, chat_template, chat_template_kwargs or {})
        bridge, encoder = None, Encoder(tokenizer, **options)
    else:
        set_templates(tokenizer, other, chat_template, chat_template_kwargs or {})
        bridge = make_bridge(other, tokenizer, table_folder())
        encoder = PairEncoder(tokenizer, other, bridge, **options)
    teacher = None
    if online:
        assert teacher_model is not None
        say(f"teacher {teacher_model} in memory: exact soft labels, recomputed at every step")
        teacher = load_online_teacher(teacher_model, tokenizer_size(other), choose_device(device))
    table = _staged(reading, folder, encoder, max_seq_length, bad)
    if teacher is None or bridge is None:
        return _source(reading, table, tokenizer, teacher)
    say(f"{kinds_line(table.kinds)}: {owner} has another vocabulary than the teacher", "positions")
    spread = spread_counted(bridge, map(shared_starts, map(table.example, range(len(table)))))
    return _source(reading, table, tokenizer, TranslatedTeacher(teacher, bridge, spread))


def text_source(
    reading: Reading,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    chat_turns: str,
    columns: Mapping[str, str],
    bad: BadRecords,
) -> Source:
    """Tokenize data files into ``folder`` as a source without labels; what a killed run did there is taken.

    Raises LogitcaskError if a file is bad.
    """
    encoder = Encoder(tokenizer, prompt_loss=False, turns=chat_turns, columns=columns)
    return _source(reading, _staged(reading, folder, encoder, max_seq_length, bad), tokenizer, None)


def _staged(reading: Reading, folder: Path, encoder: Encoder, max_seq_length: int, bad: BadRecords) -> TokenTable:
    return stage_tokens(
        encoder,
        reading.sources,
        folder,
        bad=bad,
        max_seq_length=max_seq_length,
        records=reading,
        workers=processes(max(1, usual_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))),
        resumable=True,
    )


def _source(
    reading: Reading,
    table: TokenTable,
    tokenizer: PreTrainedTokenizerBase,
    teacher: TeacherInMemory | None,
) -> Source:
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
