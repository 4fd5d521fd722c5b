"""The length of examples when none is asked for."""

from logitcask.pipeline.models.shapes import usual_length
from logitcask.pipeline.settings.precompute import PrecomputeSettings


def with_length(settings: PrecomputeSettings) -> PrecomputeSettings:
    """Return the settings with the teacher's usual length, unless they give one."""
    if "max_seq_length" in settings.model_fields_set:
        return settings
    source, revision = settings.tokenizer_source, settings.teacher_revision
    generated = int(settings.engine == "server")  # which cannot only read
    length = usual_length(source, revision, generated=generated, trust_remote_code=settings.trust_remote_code)
    return settings.model_copy(update={"max_seq_length": length})
