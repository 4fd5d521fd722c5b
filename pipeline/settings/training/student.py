"""Options about the student of ``logitcask train``."""

from typing import Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import FilePath, Place, Settings


class StudentSettings(Settings):
    """Which model is trained."""

    student_config: FilePath | None = Field(
        None, description="Hugging Face config JSON of a new student, or a name: tiny, 100m, 350m, 1b"
    )
    student_model: Place | None = Field(None, description="hub id or folder of a pretrained student")
    init_from_teacher_layers: str | None = Field(
        None, description="start from these layers of a local --teacher-model, such as 0,9,19,29"
    )
    teacher_model: Place | None = Field(
        None,
        description="source of layers; without a cache, also of the tokenizer and of exact soft labels made online",
    )

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        students = [self.student_config, self.student_model, self.init_from_teacher_layers]
        if sum(choice is not None for choice in students) != 1:
            raise ValueError("give exactly one of --student-config, --student-model, --init-from-teacher-layers")
        if self.init_from_teacher_layers is not None and self.teacher_model is None:
            raise ValueError("--init-from-teacher-layers needs --teacher-model: the local model whose layers to take")
        return self
