"""Students: new from a config, continued from a checkpoint, or begun from some of a teacher's layers."""

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
class Size:
    """Trainable parameters of a model."""

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
    """The student of a run, in float32, its special tokens those of the tokenizer.

    New from a ``config`` file, continued from a ``model``, or made of some ``teacher_layers``, as ``"0,9,19"``, of a
    ``teacher``. Raises LogitcaskError if it cannot be made, its vocabulary is smaller than ``vocab_size``, or it takes
    fewer tokens than the ``longest`` example has.
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
    """Raise LogitcaskError where a student knows too few tokens, or takes fewer than the longest example has."""
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
    """A new model in float32. Raises LogitcaskError where the file is no config of a causal language model."""
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
            f"--student-config {path}: no causal language model can be made of it: {reason}"
        ) from error
    return model


def keep_layers(model: PreTrainedModel, chosen: str) -> PreTrainedModel:
    """The model with only these of its layers, as ``"0,9,19,29"``. Raises LogitcaskError where one is not there."""
    trunk: Any = model.base_model
    holder: Any = trunk if hasattr(trunk, "layers") else getattr(trunk, "decoder", None)
    if not hasattr(holder, "layers"):
        raise LogitcaskError(f"--init-from-teacher-layers: {type(model).__name__} has no list of layers to take from")
    layers, count = holder.layers, len(holder.layers)
    try:
        places = [int(part) for part in chosen.split(",")]
    except ValueError as error:
        raise LogitcaskError(f"--init-from-teacher-layers: must be layer numbers as 0,9,19, is {chosen!r}") from error
    wrong = [place for place in places if not 0 <= place < count]
    if wrong or len(set(places)) < len(places):
        raise LogitcaskError(f"--init-from-teacher-layers: layers are 0 to {count - 1}, each once; got {chosen}")
    holder.layers = torch.nn.ModuleList(layers[place] for place in places)
    for number, layer in enumerate(holder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    model.config.num_hidden_layers = len(places)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[place] for place in places]
    return model


def count_parameters(model: PreTrainedModel) -> Size:
    """Parameters with and without the embedding matrices."""
    embeddings = {
        id(p): p.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    return Size(total, total - sum(embeddings.values()))
