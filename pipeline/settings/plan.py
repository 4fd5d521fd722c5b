"""Settings of ``logitcask plan``."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import Place, Sources, Whole, flag_of
from logitcask.pipeline.settings.data import DataSettings


class PlanSettings(DataSettings):
    """Options of ``logitcask plan``."""

    train_data: Sources | None = Field(
        None, description="data file or dataset to count, repeatable; large files are sampled"
    )
    tokens: Annotated[int, Field(ge=1, le=10**15)] | None = Field(
        None, description="number of tokens in place of a data file; all are taken to be targets"
    )
    teacher_model: Place | None = Field(
        None, description="hub id, local folder or .gguf file (no weights are read), or a size such as 7B"
    )
    student_config: Place = Field(
        "100M", description="Hugging Face config JSON of a student, a name such as tiny, or a size such as 350M"
    )
    preset: Literal["lean", "standard", "rich", "exact"] = Field(
        "standard", description="size of a label, as in stage 1"
    )
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(
        1024,
        description="tokens per example; longer examples are truncated; fewer by default if the teacher takes fewer",
    )
    prompt_loss: bool = Field(False, description="label prompts too, not only responses")
    batch_size: Whole = Field(8, description="full-length sequences per forward pass, in both stages")
    use_gradient_checkpointing: bool = Field(False, description="train the student with gradient checkpointing")
    use_mixed_precision: bool = Field(False, description="train the student with bfloat16 mixed precision")
    device: str = Field("H100", description="a device listed by --tables")
    teacher_tokens_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="measured speed of stage 1, in place of the estimate"
    )
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="price per device hour, in any currency"
    )
    tables: bool = Field(
        False, description="print devices, and what common students and teachers need; combines only with --json"
    )
    json_: bool = Field(False, description="print JSON")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if self.tables:
            others = [flag_of(name) for name in sorted(self.model_fields_set - {"tables", "json_"})]
            if others:
                raise ValueError(f"--tables shows fixed cases and does not take {', '.join(others)}: leave it out")
            return self
        if (self.train_data is None) == (self.tokens is None):
            raise ValueError("give exactly one of --train-data and --tokens")
        if self.teacher_model is None:
            raise ValueError("--teacher-model is required: a model, or a size such as 7B")
        return self
