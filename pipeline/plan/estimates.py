"""Estimates of stage 1: devices, the bytes of a cache, and the teacher's time and memory, by formula.

Sizes are in bytes, times in seconds, except where a field says GB. A measured constant names the command that measured
it; an assumed one says so. The student's memory is in ``pipeline/models/shapes.py``.
"""

import math
from dataclasses import dataclass
from typing import Literal

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.fidelity import row_width
from logitcask.pipeline.models.shapes import GB, Amount, ModelShape
from logitcask.pipeline.settings.precompute import PRESETS
from logitcask.pipeline.teachers.labelling import SLICE_LOGITS as LABEL_SLICE

Preset = Literal["lean", "standard", "rich", "exact"]


@dataclass(frozen=True)
class Device:
    """A device that runs either stage."""

    name: str
    tflops: float  # dense TFLOP/s at its peak
    bandwidth: float  # of its memory, GB/s
    memory: float  # GB
    weight_bytes: int = 2  # per parameter of a teacher, bfloat16
    utilisation: float = 0.4  # share of the peak reached; assumed: nothing here has been timed on a GPU

    def holds(self, size: float) -> bool:
        """Return whether this many bytes fit."""
        return size <= USABLE * self.memory * GB


USABLE = 0.9  # of a device's memory, assumed: the rest goes to its runtime and to fragmentation
# From NVIDIA's data sheets of the H200 SXM, H100 SXM, A100 SXM, L40S and L4, and its Ada GPU architecture paper for the
# RTX 4090, as vendors' pages quote them: bfloat16 peaks with 32-bit accumulation; figures with sparsity are halved.
GPUS = (
    Device("H200", 989, 4800, 141),
    Device("H100", 989, 3350, 80),
    Device("A100-80", 312, 2039, 80),
    Device("A100-40", 312, 1555, 40),
    Device("L40S", 362, 864, 48),
    Device("L4", 121, 300, 24),
    Device("RTX-4090", 165, 1008, 24),
)
# Not from a data sheet: the TFLOP/s (float32, 2 cores with AVX-512) are what the bare forward pass of
# python -m tests.benchmarks.capture reached, the GB/s are fitted to its time for labels; the memory is an example.
CPU = Device("2-core-CPU", 0.145, 20, 16, weight_bytes=4, utilisation=1.0)


def find_device(name: str) -> Device:
    """Return a device by name, ignoring case. Raises LogitcaskError if the name is unknown."""
    known = {device.name.lower(): device for device in (*GPUS, CPU)}
    if name.lower() not in known:
        raise LogitcaskError(
            f"--device must be one of {', '.join(device.name for device in known.values())}, got {name!r}: "
            "choose one with similar memory, and give --teacher-tokens-per-second if you have measured it"
        )
    return known[name.lower()]


def smallest_gpu(size: float) -> str | None:
    """Return the GPU with the least memory, the slowest among equals, that holds this many bytes; None if none does."""
    fitting = [device for device in GPUS if device.holds(size)]
    return min(fitting, key=lambda device: (device.memory, device.tflops)).name if fitting else None


# Compressed bytes per target position, by array, of 30,000 positions each of code and English labelled by SmolLM2:
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
# Of exact labels: ids and next tokens are those of a standard one; measured by python -m tests.benchmarks.exact_codes:
# the finer head and masses, and hidden states, by bits, of 576 features.
EXACT_BYTES = {"head_ids": 10.9, "head_logprobs": 6.8, "log_tail_odds": 3.3, "gold_logprobs": 0.6}
HIDDEN_BYTES, MEASURED_WIDTH = {3: 75.4, 4: 138.4, 5: 211.1, 6: 273.7}, 576
WIDEST = 1_400  # above, sparse labels of as many bytes have the smaller error at T=1: tests.benchmarks.exact_widths
RANDOM = 1.0, 1.7  # times as many bytes per feature of random states: at 8,192, as 1 / i; at 512, isotropic
HEAD_SHARE = 0.75  # of the head's bfloat16 numbers, compressed
# These were measured on 8,519 tokens of the demo's data, with logitcask cache info.
TOKEN_BYTES = {"input_ids": 0.89, "target_mask": 0.023}  # per token
EXAMPLE_BYTES = {"token_count": 3.0, "position_count": 3.0}  # per example
METADATA_BYTES, SHARD_BYTES = 22_000, 430  # per cache; per shard, its digests
TEMPERATURES = 3  # stored by default
TOKENIZER_BYTES = 11.1  # per token of the vocabulary, compressed, if the tokenizer is not available


def hidden_bytes(width: int, bits: int) -> float:
    """Return the bytes per position of hidden states in the code of exact labels, in proportion to their width.

    Beyond the bits that were measured, each costs one per feature.
    """
    most = max(HIDDEN_BYTES)
    return width / MEASURED_WIDTH * (HIDDEN_BYTES[min(bits, most)] + max(0, bits - most) * MEASURED_WIDTH / 8)


def where_sparse_is_better(width: int, bits: int) -> list[str]:
    """Return a line on the size of exact labels, and one on sparse ones where these are the better choice."""
    size = hidden_bytes(width, bits) + sum(EXACT_BYTES.values())
    least, most = RANDOM
    grows = (
        f"exact labels take {size:,.0f} bytes: hidden states as those of a teacher of width {MEASURED_WIDTH}, in "
        f"proportion to {width:,}; random states of 512 to 8,192 took {least} to {most} times as much per feature"
    )
    if width <= WIDEST:
        return [grows]
    rich = sum(each["rich"] for each in LABEL_BYTES.values())
    return [
        grows,
        f"at T=1, sparse labels of as many bytes are closer to a teacher wider than about {WIDEST:,}, and preset rich "
        f"takes {rich:.0f}: exact labels are for other temperatures and divergences",
    ]


def cache_bytes(
    preset: Preset, vocabulary: int, amount: Amount, shards: int, *, width: int = 0, bits: int = 4
) -> dict[str, float]:
    """Return the bytes of a cache by array, and of its metadata, without the tokenizer.

    Exact labels depend on the ``width`` of the teacher's hidden states and the ``bits`` they are kept in.

    For a vocabulary V other than the measured one, ids are scaled by the information of one id, log V; those of a tail
    of M draws, which are sorted, by that of one of M sorted ids, log(e V / M): Stirling's log(V choose M) / M.
    """
    draws = PRESETS[preset][1] or 1
    head = math.log(vocabulary) / math.log(MEASURED_VOCABULARY)
    tail = math.log(math.e * max(1.0, vocabulary / draws)) / math.log(math.e * MEASURED_VOCABULARY / draws)
    scale = {"head_ids": head, "tail_ids": tail, "input_ids": head}
    sizes = {
        **{name: amount.positions * size for name, size in _label_bytes(preset, width, bits).items()},
        **{name: amount.tokens * each for name, each in TOKEN_BYTES.items()},
        **{name: amount.examples * each for name, each in EXAMPLE_BYTES.items()},
    }
    scaled = {name: size * scale.get(name, 1.0) for name, size in sizes.items()}
    if preset == "exact":
        scaled["teacher_head"] = HEAD_SHARE * 2 * vocabulary * width + 8 * width * width
    certificate = 4.0 * row_width(TEMPERATURES) * shards
    return {**scaled, "fidelity": certificate, "metadata": float(METADATA_BYTES + SHARD_BYTES * shards)}


def _label_bytes(preset: Preset, width: int, bits: int) -> dict[str, float]:
    if preset == "exact":
        return {**EXACT_BYTES, "hidden_codes": hidden_bytes(width, bits)}
    return {name: each[preset] for name, each in LABEL_BYTES.items()}


LOGIT_PASSES = 15  # over float32 logits per label, counted in teachers/sparsify.py for temperatures 1, 1.5 and 2


def teacher_seconds(teacher: ModelShape, device: Device, amount: Amount, batch_tokens: int) -> float:
    """Return the seconds of stage 1: the forward pass, or reading the weights if that takes longer, then the labels.

    Each parameter costs a multiplication and an addition per token (Kaplan et al. 2020, Scaling Laws for Neural
    Language Models, table 1), each of the head per target position. Causal attention sees half an example on average:
    2 * 2 * length / 2 operations per layer and feature.
    """
    flops = 2.0 * teacher.body * amount.tokens + 2.0 * teacher.hidden * teacher.vocabulary * amount.positions
    flops += 2.0 * teacher.layers * teacher.attention * amount.tokens**2 / amount.examples
    passes = max(1.0, amount.tokens / batch_tokens)
    reading = passes * teacher.parameters * device.weight_bytes / (device.bandwidth * GB)
    labels = 4.0 * LOGIT_PASSES * teacher.vocabulary * amount.positions / (device.bandwidth * GB)
    return max(flops / (device.tflops * 1e12 * device.utilisation), reading) + labels


def teacher_memory(teacher: ModelShape, batch_tokens: int, weight_bytes: int) -> dict[str, float]:
    """Return the bytes of stage 1 by use. No keys or values are kept, and logits come in slices. Not measured."""
    features = 3 * teacher.inner + 6 * teacher.hidden  # per token, of one layer; earlier layers' are freed
    return {
        "weights": float(teacher.parameters * weight_bytes),
        "activations": float(batch_tokens * features * weight_bytes),
        "logits": 4.0 * LABEL_SLICE * 8,  # float32, copies at each temperature, and float64 sums
    }
