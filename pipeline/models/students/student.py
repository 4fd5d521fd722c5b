"""Students: new from a config, continued from a model, or initialised from some of a teacher's layers."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.load import load_causal_lm, max_positions, probe_logits, student_from_config
from logitcask.pipeline.models.students.layers import keep_layers
from logitcask.pipeline.text.tokenizer import end_of_turn


def make_student(
    *,
    config: Path | None,
    model: str | None,
    teacher: str | None,
    teacher_layers: Callable[[PreTrainedModel], str] | None,
    seed: int,
    vocab_size: int,
    longest: int,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Return the student of a run with the tokenizer's special tokens.

    It is new from a ``config`` file, continued from a ``model``, or built from the layers of a ``teacher`` that
    ``teacher_layers`` names, such as ``"0,9,19"``, once it is loaded. Raises LogitcaskError if it cannot be built, its
    vocabulary is smaller than ``vocab_size``, or it takes fewer tokens than the ``longest`` example has.
    """
    set_seed(seed)
    if config is not None:
        student = student_from_config(config, vocab_size)
    elif model is not None:
        student = load_causal_lm(model, dtype=dtype, **(loading or {}))
    else:
        assert teacher is not None
        assert teacher_layers is not None
        whole = load_causal_lm(teacher, dtype=torch.float32)
        student = keep_layers(whole, teacher_layers(whole))
    if model is None:
        cast(student, dtype)
    if attention is not None:
        _set_attention(student, attention)
    require_room(student, vocab_size, longest)
    if config is not None:
        _require_forward(student, config)
    set_special_tokens(student, tokenizer, new=config is not None)
    return student


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's parameters; its buffers, such as rotary frequencies, keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
        reason = "" if model.config._attn_implementation == name else "its class has only one"
    except Exception as error:  # each kernel and architecture refuses in its own way
        reason = shown_reason(error)
    if reason:
        raise LogitcaskError(
            f"--attn-implementation {name}: not for {type(model).__name__}: {reason}: use eager or sdpa, or none"
        )


def freeze(model: PreTrainedModel, pattern: str) -> None:
    """Keep the parameters in whose name a regular expression is found. Raises LogitcaskError if all or none are."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matched = [parameter for name, parameter in named if re.search(pattern, name)]
    if len(matched) in (0, len(named)):
        what = "every one" if matched else "none"
        raise LogitcaskError(
            f"--freeze {pattern}: is found in {what} of the {len(named)} names of parameters, such as {named[0][0]}: "
            f"it must leave some to train and freeze some"
        )
    for parameter in matched:
        parameter.requires_grad_(False)


def _require_forward(student: PreTrainedModel, config: Path) -> None:
    """Raise LogitcaskError if a new student cannot be run: sizes that do not fit show only then."""
    try:
        probe_logits(student)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise LogitcaskError(
            f"--student-config {config}: its model cannot be run: {shown_reason(error)}: correct its sizes"
        ) from error


def set_special_tokens(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, new: bool) -> None:
    """Give a student the tokenizer's special tokens, and every token at which its answers end.

    These are the tokenizer's, those that a pretrained student (not ``new``) knows already, and the template's end of
    turn. A single one that the student's config names may be its class's default: it counts if the tokenizer added it.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        setattr(student.config, name, value)
        generation: Any = student.generation_config
        if generation is None:
            continue
        if name == "eos_token_id":
            known = None if new else generation.eos_token_id
            special = tokenizer.added_tokens_decoder
            kept = known if isinstance(known, list) else [known] if known in special else []
            ends = [token for token in (value, *kept, end_of_turn(tokenizer)) if token is not None]
            unique = list(dict.fromkeys(ends))
            value = unique if len(unique) > 1 else next(iter(unique), None)
        setattr(generation, name, value)


def require_room(model: PreTrainedModel, vocab_size: int, longest: int) -> None:
    """Raise LogitcaskError if a student's vocabulary is too small or it takes fewer tokens than the longest example."""
    width = model.get_output_embeddings().weight.shape[0]
    if width < vocab_size:
        raise LogitcaskError(
            f"the student's vocabulary is {width}, the tokenizer's {vocab_size}: it must be at least as large; "
            "leave vocab_size out of the student config"
        )
    limit = max_positions(model)
    if limit is not None and longest > limit:
        raise LogitcaskError(
            f"the student's max_position_embeddings is {limit}, the longest example has {longest} tokens: raise it"
        )
