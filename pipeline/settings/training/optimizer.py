"""Options about the optimizer's steps of ``logitcask train``."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from logitcask.pipeline.settings.base import Settings, Whole, home_path, read_config


def _parse_arguments(value: Any) -> Any:
    """Return the fields that a JSON object or a file, JSON or YAML, gives; a mapping is kept."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("{"):
        return read_config(home_path(value))
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be a file or a JSON object: {error}") from error


TrainingArgs = Annotated[Mapping[str, Any], BeforeValidator(_parse_arguments)]


class OptimizerSettings(Settings):
    """How the student's weights are updated."""

    group = "Optimizer"

    batch_size: Whole = Field(8, description="examples per device and forward pass")
    gradient_accumulation_steps: Whole = Field(1, description="forward passes per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="peak learning rate; default: 5e-4 for a new student, 1e-4 for layers of a teacher, 1e-5 for a "
        "pretrained one, 2e-4 for an adapter",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="steps of linear warm-up before a cosine decay; default: 20, at most a tenth of the run's"
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.01, description="AdamW's weight decay")
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="clip gradients to this norm; 0: off"
    )
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1.0, description="passes over the data")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides --epochs")
    training_args: TrainingArgs = Field(
        {}, description="file, or JSON, with other fields of transformers' TrainingArguments, such as optim, adam_beta2"
    )
    use_gradient_checkpointing: bool | None = Field(
        None, description="recompute activations: less memory, slower; default: if a step would not fit otherwise"
    )
    use_mixed_precision: bool | None = Field(
        None, description="autocast to --mixed-precision-dtype; default: on a GPU that has bf16"
    )
    mixed_precision_dtype: Literal["bf16", "fp16"] = Field("bf16", description="dtype of mixed precision")
