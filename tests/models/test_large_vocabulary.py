"""A step of a Gemma 3 student with its 262,144 tokens: equal to the plain loss, without all logits in memory."""

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.batches.collate import Batch
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings, distillation_loss
from logitcask.pipeline.train.loss import make_loss_forward
from tests.support.runs import write_config

V, N, ROWS, HEAD, TAIL = 262_144, 192, 6, 8, 24
LOGITS = 4 * N * V  # bytes of one float32 matrix of logits, 201 MB
STUDENT: dict[str, object] = {
    "model_type": "gemma3_text", "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "sliding_window": 8, "final_logit_softcapping": 30.0,
}  # fmt: skip


def batch(entries: int) -> Batch:
    """Return N + ROWS tokens in ROWS rows, all but the last of each row targets; labels span the whole vocabulary."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (ROWS, N // ROWS + 1), generator=random)
    ids[0, :4] = torch.tensor([V - 1, 65_536, 131_072, V - 2])  # beyond 16 and 17 bits, and the last
    index = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    label_ids = torch.stack([torch.randperm(V, generator=random)[: HEAD + TAIL] for _ in range(N)])
    log_probs = torch.randn(N, HEAD + TAIL, generator=random).log_softmax(1) - 0.1
    rest = torch.log1p(-log_probs[:, :HEAD].exp().sum(1))
    return {
        "input_ids": ids,
        "target_index": index,
        "gold": ids.flatten()[index + 1],
        "soft_labels": SoftLabels(
            label_ids[:, :entries], log_probs[:, :entries].exp(), log_probs[:, :entries], rest, HEAD, temperature=2.0
        ),
    }


def peak() -> int:
    """Return the peak memory of this process, in bytes, since ``reset_peak``."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Start measuring; return the current memory in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # blocks already free would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured on Linux")
@pytest.mark.parametrize("tail", ["sampled", "bucket"])
def test_a_step_equals_the_plain_loss_without_its_logits_in_memory(tail: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    how = LossSettings(alpha=0.5, temperature=2.0, tail=tail, divergence="forward-kl")
    model = student_from_config(write_config(tmp_path / "student.json", STUDENT), vocab_size=V).eval()
    given, head = batch(HEAD + TAIL if tail == "sampled" else HEAD), model.get_output_embeddings().weight
    plain_forward = model.forward
    make_loss_forward(model, how)
    before = reset_peak()
    sums = model(**given)
    torch.autograd.backward(sums.total)
    took = peak() - before
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    before = reset_peak()
    logits = plain_forward(input_ids=given["input_ids"]).logits.flatten(0, 1)[given["target_index"]]
    expected = distillation_loss(logits, given["gold"], given["soft_labels"], how)
    torch.autograd.backward(expected.total)
    plain_took = peak() - before
    assert head.shape == (V, 32)
    for name in ("total", "hard", "soft", "teacher_mass", "student_mass"):
        torch.testing.assert_close(getattr(sums, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5 * scale)
    assert 4 * head.numel() < took < LOGITS, "must be the head's gradient and a slice of logits"
    assert plain_took > 2 * LOGITS, "the measurement must see the plain loss's logits"
