"""Model dimensions that determine cost, and the memory that training takes by them.

No weights are loaded: parameters are counted on the meta device.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.pipeline.models.head import SLICE_LOGITS as LOSS_SLICE
from logitcask.pipeline.models.load import count_parameters, student_from_config

GB = 10**9
HEAP = 1.75  # what activations take of a heap on a CPU, relative to their own size


@dataclass(frozen=True)
class Amount:
    """The amount of text in a data set."""

    examples: int
    tokens: int
    positions: int


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that determine what a decoder-only language model costs. Widths are in features per token."""

    name: str
    parameters: int
    body: int  # parameters that each token passes through, without unused experts, embeddings and head
    layers: int
    hidden: int
    inner: int  # width of the feed-forward block; with experts, of all active ones together
    attention: int  # width of the queries, all heads together
    vocabulary: int


# Millions of parameters: layers, hidden, inner, attention, vocabulary. Up to 1B: configs/students with SmolLM2's
# vocabulary; above: Llama 3.2 3B, Llama 3 8B, Llama 2 13B, Code Llama 34B and Llama 3 70B with Llama 3's.
KNOWN_SHAPES = {
    11: (4, 192, 512, 192, 49_152),
    100: (20, 576, 1536, 576, 49_152),
    350: (32, 960, 2560, 960, 49_152),
    1_000: (24, 1792, 4864, 1792, 49_152),
    3_000: (28, 3072, 8192, 3072, 128_256),
    7_000: (32, 4096, 14336, 4096, 128_256),
    13_000: (40, 5120, 13824, 5120, 128_256),
    34_000: (48, 8192, 22016, 8192, 128_256),
    70_000: (80, 8192, 28672, 8192, 128_256),
}
TIED_BELOW = 2 * 10**9  # smaller models share one matrix between embeddings and head
USUAL_LENGTH = 1024
SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB])", re.IGNORECASE)


def is_size(text: str) -> bool:
    """Return whether a text is a size such as ``7B`` or ``350M`` and not an existing file or folder."""
    return SIZE.fullmatch(text) is not None and not Path(text).exists()


def shape_of_size(text: str) -> ModelShape:
    """Return the shape of a model with that many parameters, with the widths of the nearest known one.

    Raises LogitcaskError if the size is malformed or outside 1M to 1000B.
    """
    match = SIZE.fullmatch(text)
    parameters = round(float(match[1]) * {"M": 10**6, "B": 10**9}[match[2].upper()]) if match else 0
    if not 10**6 <= parameters <= 10**12:
        raise LogitcaskError(f"a model's size must be from 1M to 1000B, such as 350M or 7B, got {text!r}")
    nearest = min(KNOWN_SHAPES, key=lambda millions: abs(math.log(millions * 1e6 / parameters)))
    layers, hidden, inner, attention, vocabulary = KNOWN_SHAPES[nearest]
    matrices = hidden * vocabulary * (1 if parameters < TIED_BELOW else 2)
    body = max(parameters - matrices, parameters // 10)
    return ModelShape(text.upper(), parameters, body, layers, hidden, inner, attention, vocabulary)


def shape_of_teacher(source: str, revision: str | None = None) -> ModelShape:
    """Return the shape of a hub id, model folder or GGUF file. Raises LogitcaskError if its config cannot be read."""
    path = Path(source)
    if path.suffix == ".gguf" and not path.is_file():
        raise LogitcaskError(f"--teacher-model {source}: no such GGUF file: give its size instead, such as 7B")
    try:
        with torch.device("meta"):
            config = _config_of(source, revision, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # missing, offline, or refused: each architecture validates configs in its own way
        reason = shown_reason(error)
        raise LogitcaskError(
            f"--teacher-model {source}: no model config could be read: {reason}: give its size instead, such as 7B"
        ) from error
    return shape_of_model(model, path.name if path.exists() else source)


def usual_length(
    source: str, revision: str | None = None, *, generated: int = 0, trust_remote_code: bool = False
) -> int:
    """Return the tokens per example of stage 1 by default: as many as the teacher takes, at most 1,024.

    ``generated``: how many it generates after them. A config that cannot be read, or sets no limit, counts as taking
    them all.
    """
    try:
        config = _config_of(source, revision, trust_remote_code=trust_remote_code).get_text_config()
    except Exception:  # loading the teacher says what is wrong with it
        return USUAL_LENGTH
    longest = getattr(config, "max_position_embeddings", None)
    return min(USUAL_LENGTH, longest - generated) if longest else USUAL_LENGTH


def _config_of(source: str, revision: str | None, *, trust_remote_code: bool) -> Any:
    if source.endswith(".gguf"):
        path = Path(source)
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=trust_remote_code)
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def shape_of_student(path: Path, vocabulary: int) -> ModelShape:
    """Return the shape of a config file. Raises LogitcaskError if no model can be built from it."""
    with torch.device("meta"):
        return shape_of_model(student_from_config(path, vocabulary), path.name)


def shape_of_model(model: PreTrainedModel, name: str) -> ModelShape:
    """Return the shape of a model."""
    counts, config = count_parameters(model), model.config.get_text_config()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active, share = _experts(config)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        parameters=counts.total,
        body=counts.without_embeddings - round(experts * (1 - share)),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=(inner or 4 * config.hidden_size) * active,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=config.vocab_size,
    )


def _experts(config: Any) -> tuple[int, float]:
    """Return how many experts are active per token and their share of all; 1 and 1.0 for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((value for value in (getattr(config, name, None) for name in names) if value), None)
    active = getattr(config, "num_experts_per_tok", None)
    return (active, active / total) if total and active else (1, 1.0)


def student_memory(
    student: ModelShape,
    tokens: int,
    *,
    checkpointing: bool,
    mixed: bool,
    on_cpu: bool = False,
    trained: int | None = None,
) -> dict[str, float]:
    """Return the bytes stage 2 takes, by purpose, for ``tokens`` per forward pass, padding included.

    After Korthikanti et al. (2022), Reducing Activation Recomputation in Large Transformer Models, section 4, for
    Llama-style blocks: no dropout, RMSNorm, gated feed-forward, and attention that stores no score matrix. Per token,
    a block of width h, attention width a and feed-forward width f stores: both norms' input, normalised and scaled
    (6 h); queries, keys and values repeated to all heads, and their output (4 a); gate, its activation, up, and their
    product (4 f). With mixed precision the norms stay in float32 and each of the five linear maps after one stores its
    own 16-bit copy (16 h + 10 h bytes, the rest halved). On a CPU a block stores its input and the results of all
    matrix products but the last (``models/recompute.py``): 2 h, 4 a and 2 f, the products' in 16 bits with mixed
    precision; one block at a time is recomputed in full. There a heap holds all of it, whose gaps take three quarters
    as much again.
    If only ``trained`` parameters learn, the others have neither gradients nor moments.
    ``python -m tests.benchmarks.memory_model`` compares the formula with real training.
    """
    h, a, f = student.hidden, student.attention, student.inner
    block = 26 * h + 8 * a + 8 * f if mixed else 24 * h + 16 * a + 16 * f
    products = 6 * h + 8 * a + 4 * f if mixed else 8 * h + 16 * a + 8 * f
    stored: float = student.layers * block
    if checkpointing or on_cpu:
        stored = student.layers * (4 * h if checkpointing else products) + block
    stored *= HEAP if on_cpu else 1.0
    learning = student.parameters if trained is None else trained
    return {
        "weights": (6.0 if mixed else 4.0) * student.parameters,  # float32, and autocast's 16-bit copy
        "gradients": 4.0 * learning,
        "optimizer": 8.0 * learning,  # AdamW's two moments
        "activations": float(tokens * (stored + 16 * h)),
        "loss": 4.0 * (2 * min(LOSS_SLICE, tokens * student.vocabulary) + student.vocabulary * h),
    }
