"""Options about the optimizer's steps of ``logitcask train``."""

from typing import Annotated, Literal

from pydantic import Field

from logitcask.pipeline.settings.base import Settings, Whole


class OptimizerSettings(Settings):
    """How the student's weights are updated."""

    batch_size: Whole = Field(8, description="examples per device and forward pass")
    gradient_accumulation_steps: Whole = Field(1, description="forward passes per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(5e-4, description="peak learning rate")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="steps of linear warm-up before a cosine decay")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.01, description="AdamW's weight decay")
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="clip gradients to this norm; 0: off"
    )
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1.0, description="passes over the data")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides --epochs")
    use_gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    use_mixed_precision: bool = Field(False, description="autocast to --mixed-precision-dtype")
    mixed_precision_dtype: Literal["bf16", "fp16"] = Field("bf16", description="dtype of mixed precision")
