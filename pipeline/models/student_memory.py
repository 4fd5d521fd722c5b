"""A formula for the memory, in bytes, that training a student takes."""

from dataclasses import dataclass

from logitcask.pipeline.models.fused_loss import SLICE_LOGITS as LOSS_SLICE
from logitcask.pipeline.models.shapes import ModelShape

GB = 10**9


@dataclass(frozen=True)
class Amount:
    """The amount of text in a data set."""

    examples: int
    tokens: int
    positions: int


def student_memory(
    student: ModelShape, tokens: int, *, checkpointing: bool, mixed: bool, on_cpu: bool = False
) -> dict[str, float]:
    """Return the bytes stage 2 takes, by purpose, for ``tokens`` per forward pass, padding included.

    After Korthikanti et al. (2022), Reducing Activation Recomputation in Large Transformer Models, section 4, for
    Llama-style blocks: no dropout, RMSNorm, gated feed-forward, and attention that stores no score matrix. Per token,
    a block of width h, attention width a and feed-forward width f stores: both norms' input, normalised and scaled
    (6 h); queries, keys and values repeated to all heads, and their output (4 a); gate, its activation, up, and their
    product (4 f). With mixed precision the norms stay in float32 and each of the five linear maps after one stores its
    own 16-bit copy (16 h + 10 h bytes, the rest halved). On a CPU a block stores its input and the results of all
    matrix products but the last (``models/recompute.py``): 2 h, 4 a and 2 f, the products' in 16 bits with mixed
    precision; one block at a time is recomputed in full.
    ``python -m tests.benchmarks.memory_model`` compares the formula with real training.
    """
    h, a, f = student.hidden, student.attention, student.inner
    block = 26 * h + 8 * a + 8 * f if mixed else 24 * h + 16 * a + 16 * f
    products = 6 * h + 8 * a + 4 * f if mixed else 8 * h + 16 * a + 8 * f
    stored = student.layers * block
    if checkpointing or on_cpu:
        stored = student.layers * (4 * h if checkpointing else products) + block
    return {
        "weights": (6.0 if mixed else 4.0) * student.parameters,  # float32, and autocast's 16-bit copy
        "gradients": 4.0 * student.parameters,
        "optimizer": 8.0 * student.parameters,  # AdamW's two moments
        "activations": float(tokens * (stored + 16 * h)),
        "loss": 4.0 * (2 * min(LOSS_SLICE, tokens * student.vocabulary) + student.vocabulary * h),
    }
