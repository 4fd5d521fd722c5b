"""Students: new from a config, continued from a model, or initialised from some of a teacher's layers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.load import load_causal_lm, max_positions
from logitcask.pipeline.settings.base import config_file


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of a model."""

    total: int
    without_embeddings: int


def make_student(
    *,
    config: Path | None,
    model: str | None,
    teacher: str | None,
    teacher_layers: str | None,
    seed: int,
    vocab_size: int,
    longest: int,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Return the student of a run, in float32, with the tokenizer's special tokens.

    It is new from a ``config`` file, continued from a ``model``, or built from the ``teacher_layers`` (such as
    ``"0,9,19"``) of a ``teacher``. Raises LogitcaskError if it cannot be built, its vocabulary is smaller than
    ``vocab_size``, or it takes fewer tokens than the ``longest`` example has.
    """
    set_seed(seed)
    if config is not None:
        student = student_from_config(config, vocab_size)
    elif model is not None:
        student = load_causal_lm(model, dtype=torch.float32)
    else:
        assert teacher is not None
        assert teacher_layers is not None
        student = keep_layers(load_causal_lm(teacher, dtype=torch.float32), teacher_layers)
    require_room(student, vocab_size, longest)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        setattr(student.config, name, value)
        if student.generation_config is not None:
            setattr(student.generation_config, name, value)
    return student


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


def student_from_config(path: Path, vocab_size: int) -> PreTrainedModel:
    """Build a new model in float32. Raises LogitcaskError if the file is not the config of a causal language model."""
    try:
        path = config_file("students", path)
        values: Any = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise LogitcaskError(f"--student-config {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise LogitcaskError(f"--student-config {path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise LogitcaskError(f"--student-config {path}: must be a Hugging Face config: a JSON object with model_type")
    values.setdefault("vocab_size", vocab_size)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # configs are validated by each architecture in its own way
        reason = " ".join(str(error).split())
        raise LogitcaskError(
            f"--student-config {path}: no causal language model can be built from it: {reason}"
        ) from error
    return model


def keep_layers(model: PreTrainedModel, chosen: str) -> PreTrainedModel:
    """Drop all layers but the chosen ones, such as ``"0,9,19,29"``. Raises LogitcaskError if one does not exist."""
    base: Any = model.base_model
    decoder: Any = base if hasattr(base, "layers") else getattr(base, "decoder", None)
    if not hasattr(decoder, "layers"):
        raise LogitcaskError(f"--init-from-teacher-layers: {type(model).__name__} has no list of layers to take from")
    layers, count = decoder.layers, len(decoder.layers)
    try:
        indices = [int(part) for part in chosen.split(",")]
    except ValueError as error:
        raise LogitcaskError(
            f"--init-from-teacher-layers: must be layer numbers such as 0,9,19, got {chosen!r}"
        ) from error
    out_of_range = [index for index in indices if not 0 <= index < count]
    if out_of_range or len(set(indices)) < len(indices):
        raise LogitcaskError(f"--init-from-teacher-layers: layers are 0 to {count - 1}, each once; got {chosen}")
    decoder.layers = torch.nn.ModuleList(layers[index] for index in indices)
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    model.config.num_hidden_layers = len(indices)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in indices]
    return model


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Count parameters with and without the embedding matrices."""
    embeddings = {
        id(p): p.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCount(total, total - sum(embeddings.values()))
