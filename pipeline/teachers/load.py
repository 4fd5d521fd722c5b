"""Choose and load the engine that runs the teacher, and check its labels against those of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.teachers.labelling import require_possible
from logitcask.pipeline.teachers.served.servers import Connection
from logitcask.pipeline.teachers.served.teacher import load_served_teacher
from logitcask.pipeline.teachers.teacher import Teacher, TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher, load_teacher
from logitcask.pipeline.teachers.translated.teacher import TranslatedTeacher
from logitcask.pipeline.teachers.vllm import load_vllm_teacher
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.vocabulary.rests import make_bridge, table_folder
from logitcask.pipeline.vocabulary.spread import Spread

TOLERANCE = {"float32": 1e-3}  # largest difference, in nats, of log-partitions and next-token log-probabilities
HALF_TOLERANCE = 0.5  # for 16-bit dtypes: above their rounding errors, below the differences of a wrong model
CHECKED_EXAMPLES = 4


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher to load, and how: all that a worker needs to load it."""

    model: str
    revision: str | None
    engine: str
    dtype: str
    device: str
    max_seq_length: int
    tensor_parallel_size: int
    trust_remote_code: bool
    head_size: int  # prompt log-probabilities per position for --engine vllm-topk and server
    tokenizer: str = ""  # where that of a served model is
    connection: Connection | None = None  # to the servers of --engine server
    student_tokenizer: str | None = None  # of the labels, if it is not the teacher's own
    spread: Spread | None = None  # what the data say of the two vocabularies


def load_engine(spec: TeacherSpec) -> Teacher:
    """Load the teacher in the requested engine. Raises LogitcaskError if the model or the engine cannot be loaded."""
    if spec.connection is not None:
        return load_served_teacher(
            spec.model,
            spec.connection,
            spec.tokenizer,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            head_size=spec.head_size,
        )
    if spec.student_tokenizer is not None:
        loading: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        student = load_tokenizer(spec.student_tokenizer, **loading)
        own = load_tokenizer(spec.tokenizer, revision=spec.revision, **loading)
        bridge = make_bridge(own, student, table_folder())
        return TranslatedTeacher(load_transformers(spec, spec.dtype, spec.device), bridge, spec.spread)
    if choose_engine(spec.engine, spec.model) == "transformers":
        return load_transformers(spec, spec.dtype, spec.device)
    return load_vllm_teacher(
        spec.model,
        revision=spec.revision,
        dtype=spec.dtype,
        max_seq_length=spec.max_seq_length,
        tensor_parallel_size=spec.tensor_parallel_size,
        trust_remote_code=spec.trust_remote_code,
        topk=spec.head_size if spec.engine == "vllm-topk" else None,
    )


def choose_engine(engine: str, teacher: str) -> str:
    """Return the engine to use; ``auto`` is vLLM if it is installed, can read the teacher, and has an accelerator."""
    if engine != "auto":
        return engine
    vllm = find_spec("vllm") is not None and torch.accelerator.is_available() and not teacher.endswith(".gguf")
    return "vllm" if vllm else "transformers"


def load_transformers(spec: TeacherSpec, dtype: str, device: str) -> TransformersTeacher:
    """Load the teacher in plain PyTorch."""
    return load_teacher(
        spec.model,
        revision=spec.revision,
        dtype=dtype,
        device=device,
        trust_remote_code=spec.trust_remote_code,
    )


def check_engine(teacher: Teacher, spec: TeacherSpec, batch: Sequence[TokenizedExample], label: LabelSettings) -> None:
    """Compare a few labels with those of transformers in float32.

    Transformers runs on the CPU, since the engine has filled the accelerator. Raises LogitcaskError if they differ, or
    if the engine's are impossible.
    """
    examples, identity = batch[-CHECKED_EXAMPLES:], teacher.facts.identity  # the shortest ones
    label = label.model_copy(update={"exact": None})  # codes of hidden states are of the engine's own head
    labels = teacher.label(examples, label)
    require_possible(examples, labels.targets, label, identity.dtype)
    expected = load_transformers(spec, "float32", "cpu").label(examples, label)
    limit = TOLERANCE.get(identity.dtype, HALF_TOLERANCE)
    for name in ("gold_logprobs", "log_partition"):
        differences = [
            np.abs(getattr(a, name) - getattr(b, name)).max()
            for a, b in zip(labels.targets, expected.targets, strict=True)
        ]
        difference = float(np.max(differences))  # NaN if any is: Python's max may skip one
        if not difference <= limit:
            raise LogitcaskError(
                f"{identity.engine} and transformers disagree: {name} differs by {difference:.3g} nats, "
                f"at most {limit:g} is expected in {identity.dtype}: use --engine transformers; "
                "--skip-engine-check is for teachers too large to load twice"
            )
