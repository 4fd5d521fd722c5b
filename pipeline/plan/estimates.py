"""What runs cost, as formulas: shapes of models, devices, bytes of a cache, seconds and memory of the stages.

No weights are loaded: parameters are counted on the meta device. Sizes are in bytes, times in seconds. A measured
constant names the command that measured it; what is assumed says so.
"""

import math
from dataclasses import dataclass
from typing import Literal

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.fidelity import row_width
from logitcask.pipeline.models.shapes import ModelShape
from logitcask.pipeline.models.student_memory import GB, Amount
from logitcask.pipeline.settings.precompute import PRESETS
from logitcask.pipeline.teachers.labelling import SLICE_LOGITS as LABEL_SLICE

Preset = Literal["lean", "standard", "rich"]


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
