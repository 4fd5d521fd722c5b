"""What runs cost, as formulas: shapes of models, devices, bytes of a cache, seconds and memory of the stages.

No weights are loaded: parameters are counted on the meta device. Sizes are in bytes, times in seconds. A measured
constant names the command that measured it; what is assumed says so.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.fidelity import row_width
from logitcask.pipeline.fused import SLICE_LOGITS as LOSS_SLICE
from logitcask.pipeline.labelling import SLICE_LOGITS as LABEL_SLICE
from logitcask.pipeline.settings import PRESETS
from logitcask.pipeline.student import count_parameters, student_from_config

Preset = Literal["lean", "standard", "rich"]
GB = 10**9


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a decoder-only language model costs. Widths are in features a token."""

    name: str
    parameters: int
    body: int  # parameters of the layers that one token meets: experts not chosen, embeddings and head left out
    layers: int
    hidden: int
    inner: int  # of the feed-forward block; of all chosen experts together
    attention: int  # queries of all heads
    vocabulary: int


# Millions of parameters: layers, hidden, inner, attention, vocabulary. Up to 1B configs/students with SmolLM2's
# vocabulary, then Llama 3.2 3B, Llama 3 8B, Llama 2 13B, Code Llama 34B and Llama 3 70B with Llama 3's.
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
TIED_BELOW = 2 * 10**9  # small models share the matrix of embeddings and head
SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB])", re.IGNORECASE)


def is_size(text: str) -> bool:
    """Whether a text is a size such as ``7B`` or ``350M`` and no file or folder."""
    return SIZE.fullmatch(text) is not None and not Path(text).exists()


def shape_of_size(text: str) -> ModelShape:
    """A model of that many parameters, shaped like the nearest known one. Raises LogitcaskError beyond 1M to 1000B."""
    found = SIZE.fullmatch(text)
    parameters = round(float(found[1]) * {"M": 10**6, "B": 10**9}[found[2].upper()]) if found else 0
    if not 10**6 <= parameters <= 10**12:
        raise LogitcaskError(f"a model's size must be from 1M to 1000B, such as 350M or 7B, is {text!r}")
    nearest = min(KNOWN_SHAPES, key=lambda millions: abs(math.log(millions * 1e6 / parameters)))
    layers, hidden, inner, attention, vocabulary = KNOWN_SHAPES[nearest]
    matrices = hidden * vocabulary * (1 if parameters < TIED_BELOW else 2)
    body = max(parameters - matrices, parameters // 10)
    return ModelShape(text.upper(), parameters, body, layers, hidden, inner, attention, vocabulary)


def shape_of_teacher(source: str, revision: str | None = None) -> ModelShape:
    """The shape of a hub id, a model's folder or a GGUF file. Raises LogitcaskError where its config cannot be had."""
    path = Path(source)
    try:
        with torch.device("meta"):
            if source.endswith(".gguf"):
                config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
            else:
                config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # no such place, no connection; each architecture refuses configs in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LogitcaskError(
            f"--teacher-model {source}: no model's config could be read: {reason}: give its size, such as 7B"
        ) from error
    return shape_of_model(model, path.name if path.exists() else source)


def shape_of_student(path: Path, vocabulary: int) -> ModelShape:
    """The shape of a config file. Raises LogitcaskError where no model can be made of it."""
    with torch.device("meta"):
        return shape_of_model(student_from_config(path, vocabulary), path.name)


def shape_of_model(model: PreTrainedModel, name: str) -> ModelShape:
    """The shape of a model."""
    size, config = count_parameters(model), model.config.get_text_config()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    chosen, share = _experts(config)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        parameters=size.total,
        body=size.without_embeddings - round(experts * (1 - share)),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=(inner or 4 * config.hidden_size) * chosen,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=config.vocab_size,
    )


def _experts(config: Any) -> tuple[int, float]:
    """Experts that a token meets, and their share of all; 1 and 1.0 where the model has none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    every = next((value for value in (getattr(config, name, None) for name in names) if value), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return (chosen, chosen / every) if every and chosen else (1, 1.0)


@dataclass(frozen=True)
class Device:
    """A device: dense TFLOP/s, GB/s and GB of memory, bytes of a teacher's weight, share of the TFLOP/s reached."""

    name: str
    tflops: float
    bandwidth: float
    memory: float
    weight_bytes: int = 2  # bfloat16
    utilisation: float = 0.4  # assumed: nothing here has been timed on a GPU

    def holds(self, size: float) -> bool:
        """Whether so many bytes fit."""
        return size <= USABLE * self.memory * GB


USABLE = 0.9  # of a device's memory, assumed: the rest goes to its runtime and to fragmentation
# NVIDIA's data sheets of the H200 SXM, H100 SXM, A100 SXM, L40S and L4, and its Ada GPU architecture paper for the
# RTX 4090, as vendors' pages quote them: peaks in bfloat16, 32-bit accumulation; what is given with sparsity is halved.
GPUS = (
    Device("H200", 989, 4800, 141),
    Device("H100", 989, 3350, 80),
    Device("A100-80", 312, 2039, 80),
    Device("A100-40", 312, 1555, 40),
    Device("L40S", 362, 864, 48),
    Device("L4", 121, 300, 24),
    Device("RTX-4090", 165, 1008, 24),
)
# No data sheet's: the TFLOP/s (float32, 2 cores with AVX-512) are what the bare forward pass of
# python -m tests.benchmarks.capture reached, the GB/s make labels cost what it measured; the memory is an example.
CPU = Device("2-core-CPU", 0.145, 20, 16, weight_bytes=4, utilisation=1.0)


def find_device(name: str) -> Device:
    """A device by name, in any case of letters. Raises LogitcaskError for none such."""
    known = {device.name.lower(): device for device in (*GPUS, CPU)}
    if name.lower() not in known:
        raise LogitcaskError(
            f"--device must be one of {', '.join(device.name for device in known.values())}, is {name!r}: "
            "take one of like memory, and give --teacher-tokens-per-second where you have measured it"
        )
    return known[name.lower()]


def smallest_gpu(size: float) -> str | None:
    """The GPU of least memory, the slowest of equals, that holds so many bytes; None where none does."""
    fitting = [device for device in GPUS if device.holds(size)]
    return min(fitting, key=lambda device: (device.memory, device.tflops)).name if fitting else None


@dataclass(frozen=True)
class Amount:
    """How much text there is."""

    examples: int
    tokens: int
    positions: int


# Bytes a target position, by array: 30,000 positions each of code and English labelled by SmolLM2, compressed:
# python -m tests.benchmarks.sizes.
LABEL_BYTES: dict[str, dict[Preset, float]] = {
    "head_ids": {"lean": 5.1, "standard": 10.9, "rich": 49.5},
    "head_logprobs": {"lean": 2.3, "standard": 4.0, "rich": 9.6},
    "tail_ids": {"lean": 13.1, "standard": 34.6, "rich": 83.1},
    "tail_logprobs": {"lean": 3.3, "standard": 9.3, "rich": 23.9},
    "tail_counts": {"lean": 0.57, "standard": 1.90, "rich": 3.8},
    "log_tail_odds": {"lean": 2.1, "standard": 2.1, "rich": 2.1},
    "gold_logprobs": {"lean": 0.6, "standard": 0.6, "rich": 0.6},
}
MEASURED_VOCABULARY = 49_152
# The rest was measured on 8,519 tokens of the demo's data: logitcask cache info.
TOKEN_BYTES = {"input_ids": 0.89, "target_mask": 0.023}  # a token
EXAMPLE_BYTES = {"token_count": 3.0, "position_count": 3.0}  # an example
METADATA_BYTES, SHARD_BYTES = 22_000, 430  # a cache; a shard's digests
TEMPERATURES = 3  # stored by default
TOKENIZER_BYTES = 11.1  # a token of the vocabulary, compressed, where the tokenizer is not at hand


def cache_bytes(preset: Preset, vocabulary: int, amount: Amount, shards: int) -> dict[str, float]:
    """Bytes of a cache by array, and of its metadata; without the tokenizer.

    Ids of another vocabulary than the measured one cost in proportion to the information of one id, log V; those of a
    tail of M draws, which ascend, to that of one of M sorted ids, log(e V / M): Stirling's log(V choose M) / M.
    """
    draws = PRESETS[preset][1]
    head = math.log(vocabulary) / math.log(MEASURED_VOCABULARY)
    tail = math.log(math.e * max(1.0, vocabulary / draws)) / math.log(math.e * MEASURED_VOCABULARY / draws)
    wider = {"head_ids": head, "tail_ids": tail, "input_ids": head}
    found = {
        **{name: amount.positions * each[preset] for name, each in LABEL_BYTES.items()},
        **{name: amount.tokens * each for name, each in TOKEN_BYTES.items()},
        **{name: amount.examples * each for name, each in EXAMPLE_BYTES.items()},
    }
    sized = {name: size * wider.get(name, 1.0) for name, size in found.items()}
    certificate = 4.0 * row_width(TEMPERATURES) * shards
    return {**sized, "fidelity": certificate, "metadata": float(METADATA_BYTES + SHARD_BYTES * shards)}


LOGIT_PASSES = 15  # over float32 logits to make a label, counted in pipeline.sparsify for temperatures 1, 1.5 and 2


def teacher_seconds(teacher: ModelShape, device: Device, amount: Amount, batch_tokens: int) -> float:
    """Seconds of stage 1: the forward pass, or reading the weights where that takes longer, then making the labels.

    A parameter is a multiplication and an addition a token (Kaplan et al. 2020, Scaling Laws for Neural Language
    Models, table 1), of the head a target position; causal attention looks back over half an example: 2 * 2 * length
    / 2 operations a layer and feature.
    """
    flops = 2.0 * teacher.body * amount.tokens + 2.0 * teacher.hidden * teacher.vocabulary * amount.positions
    flops += 2.0 * teacher.layers * teacher.attention * amount.tokens**2 / amount.examples
    passes = max(1.0, amount.tokens / batch_tokens)
    reading = passes * teacher.parameters * device.weight_bytes / (device.bandwidth * GB)
    labels = 4.0 * LOGIT_PASSES * teacher.vocabulary * amount.positions / (device.bandwidth * GB)
    return max(flops / (device.tflops * 1e12 * device.utilisation), reading) + labels


def teacher_memory(teacher: ModelShape, batch_tokens: int, weight_bytes: int) -> dict[str, float]:
    """Bytes in stage 1 by what takes them. No key or value is kept, and logits come in slices. Not measured."""
    live = 3 * teacher.inner + 6 * teacher.hidden  # of one layer; those before it are gone
    return {
        "weights": float(teacher.parameters * weight_bytes),
        "activations": float(batch_tokens * live * weight_bytes),
        "logits": 4.0 * LABEL_SLICE * 8,  # float32, its tempered copies, and float64 sums
    }


def student_memory(
    student: ModelShape, tokens: int, *, checkpointing: bool, mixed: bool, on_cpu: bool = False
) -> dict[str, float]:
    """Bytes in stage 2, by what takes them, for ``tokens`` a forward pass, padding included.

    After Korthikanti et al. (2022), Reducing Activation Recomputation in Large Transformer Models, section 4, for
    blocks of the Llama kind: no dropout, RMSNorm, gated feed-forward, and attention that keeps no matrix of scores. A
    block keeps, a token: both norms' input, normalised and scaled (6 h); queries, keys and values repeated to all
    heads, and their output (4 a); gate, its activation, up, and their product (4 f). With mixed precision the norms
    stay in float32 and each of the five linear maps after one keeps its own 16-bit copy (16 h + 10 h bytes, the rest
    halved). On a CPU it keeps its input and the results of all products but the last (pipeline/activations.py): 2 h, 4
    a and 2 f, the products' in 16 bits with mixed precision; one block at a time is made whole again.
    Measured against training by ``python -m tests.benchmarks.memory_model``.
    """
    h, a, f = student.hidden, student.attention, student.inner
    block = 26 * h + 8 * a + 8 * f if mixed else 24 * h + 16 * a + 16 * f
    products = 6 * h + 8 * a + 4 * f if mixed else 8 * h + 16 * a + 8 * f
    kept = student.layers * block
    if checkpointing or on_cpu:
        kept = student.layers * (4 * h if checkpointing else products) + block
    return {
        "weights": (6.0 if mixed else 4.0) * student.parameters,  # float32, and autocast's 16-bit copy
        "gradients": 4.0 * student.parameters,
        "optimizer": 8.0 * student.parameters,  # AdamW's two moments
        "activations": float(tokens * (kept + 16 * h)),
        "loss": 4.0 * (2 * min(LOSS_SLICE, tokens * student.vocabulary) + student.vocabulary * h),
    }
