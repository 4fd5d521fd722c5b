"""The length of examples when none is asked for."""

from logitcask.pipeline.models.shapes import usual_length
from logitcask.pipeline.settings.precompute import PrecomputeSettings


def with_length(settings: PrecomputeSettings) -> PrecomputeSettings:
    """Return the settings with the teacher's usual length, unless they give one."""
    if "max_seq_length" in settings.model_fields_set:
        return settings
    source, revision = settings.teacher_model, settings.teacher_revision
    length = usual_length(source, revision, trust_remote_code=settings.trust_remote_code)
    return settings.model_copy(update={"max_seq_length": length})
