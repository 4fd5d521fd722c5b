"""Options about the student of ``logitcask train``."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from logitcask.pipeline.settings.base import FilePath, Place, Settings, Whole, flag_of


class StudentSettings(Settings):
    """Which model is trained."""

    group = "Student"

    student_config: FilePath | None = Field(
        None, description="Hugging Face config JSON of a new student, or a name: tiny, 100m, 350m, 1b"
    )
    student_model: Place | None = Field(None, description="hub id or folder of a pretrained student")
    init_from_teacher_layers: str | None = Field(
        None,
        description="start from these layers of a local --teacher-model, such as 0,9,19,29; auto:20: from the 20 whose "
        "removal one by one would raise its loss most",
    )
    teacher_model: Place | None = Field(
        None,
        description="source of layers; without a cache, also of exact soft labels made online, and of the tokenizer "
        "unless the student has one",
    )
    student_revision: str | None = Field(None, description="branch, tag or commit of the --student-model on the hub")
    trust_remote_code: bool = Field(False, description="run the code that a --student-model brings")
    student_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the weights in training")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights in final/; default: the one the student came in"
    )
    attn_implementation: str | None = Field(None, description="attention by its name in transformers, such as eager")
    torch_compile: bool = Field(False, description="compile the student with torch.compile")
    load_in_4bit: bool = Field(False, description="hold the weights below an adapter in 4 bits (bitsandbytes)")
    freeze: str | None = Field(None, description="regular expression: parameters in whose name it is found stay as are")
    lora_rank: Whole | None = Field(None, description="train a low-rank adapter (LoRA) of a --student-model instead")
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="the adapter's scale times the rank; default: twice the rank"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout of the adapter's input")
    lora_target_modules: str = Field("all-linear", description="layers that get an adapter, such as q_proj,v_proj")
    merge_lora: bool = Field(False, description="final/ is the whole model, not the adapter")

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        students = [self.student_config, self.student_model, self.init_from_teacher_layers]
        if sum(choice is not None for choice in students) != 1:
            raise ValueError("give exactly one of --student-config, --student-model, --init-from-teacher-layers")
        if self.init_from_teacher_layers is not None and self.teacher_model is None:
            raise ValueError("--init-from-teacher-layers needs --teacher-model: the local model whose layers to take")
        if self.lora_rank is not None and self.student_model is None:
            raise ValueError("--lora-rank needs --student-model: an adapter belongs to a model that others can load")
        if self.lora_rank is not None and str(self.student_model).endswith(".gguf") and not self.merge_lora:
            raise ValueError("--lora-rank of a GGUF file needs --merge-lora: peft does not load an adapter of one")
        if self.student_model is None and (self.student_revision is not None or self.trust_remote_code):
            raise ValueError("--student-revision and --trust-remote-code apply to a --student-model: leave them out")
        if self.load_in_4bit and self.lora_rank is None:
            raise ValueError("--load-in-4bit needs --lora-rank: weights in 4 bits do not learn, an adapter does")
        if self.save_dtype is not None and self.lora_rank is not None and not self.merge_lora:
            raise ValueError("--save-dtype of an adapter needs --merge-lora: an adapter is saved as it was trained")
        return self

    @field_validator("init_from_teacher_layers")
    @classmethod
    def _is_a_list_or_a_count(cls, layers: str | None) -> str | None:
        if layers is not None and re.fullmatch(r"auto:[1-9][0-9]{0,5}|[0-9]+( *, *[0-9]+)*", layers) is None:
            raise ValueError("must be layer numbers such as 0,9,19, or auto:20 for the best 20")
        return layers

    @property
    def layers_to_choose(self) -> int | None:
        """How many layers of the teacher are to be chosen; None if they are given, or none are taken."""
        layers = self.init_from_teacher_layers or ""
        return int(layers.removeprefix("auto:")) if layers.startswith("auto:") else None

    @field_validator("freeze")
    @classmethod
    def _is_a_regular_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"must be a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _lora_options_have_a_rank(self) -> Self:
        options = {"lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora"}
        given = sorted(flag_of(name) for name in options & self.model_fields_set)
        if self.lora_rank is None and given:
            raise ValueError(f"{', '.join(given)} needs --lora-rank")
        return self
