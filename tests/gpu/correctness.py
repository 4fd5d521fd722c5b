"""Are labels, losses, gradients and batches on the device what they are on a CPU, in float64 where it counts.

Legend: N positions, H width, V vocabulary, K head tokens, M tail draws.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcask.cache.labels import SoftLabels, SparseTargets, soft_labels
from logitcask.pipeline.models import fused_loss as its_fused_loss
from logitcask.pipeline.models.dense.rows import TeacherRows
from logitcask.pipeline.models.fused_loss import fused_loss, fused_position_losses
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.models.losses import LossSettings, distillation_loss
from logitcask.pipeline.teachers.sparsify import sparsify
from tests.gpu.rows import Place, Row, relative_error

fused: Any = its_fused_loss
TEMPERATURES = (1.0, 1.5, 2.0)
TAILS = (
    ("sampled", "forward-kl"),
    ("renormalize", "forward-kl"),
    *(("bucket", divergence) for divergence in ("forward-kl", "reverse-kl", "jsd")),
)
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}  # relative errors: bf16 rounds logits and gradients to 8 bits
NATS = 1e-4  # of a label: float32 against float64
SAME_DRAWS = 0.999  # a sum that rounds the other way moves a draw to the neighbouring token


def logits_of(n: int, vocab: int) -> Tensor:
    """Return teacher logits (N, V) in float32, on the CPU; the head holds about half of the probability."""
    random = torch.Generator().manual_seed(0)
    return 4.0 * torch.randn(n, vocab, generator=random)


def targets_of(logits: Tensor, device: torch.device, head: int = 8, draws: int = 24) -> SparseTargets:
    """Return the labels of logits (N, V), computed on a device."""
    random = torch.Generator().manual_seed(1)
    n, vocab = logits.shape
    gold = torch.randint(vocab, (n,), generator=random)
    uniforms = torch.rand(n, draws, generator=random, dtype=torch.float64)
    return sparsify(logits.to(device), gold.to(device), uniforms.to(device), head, TEMPERATURES)


def sparsified(place: Place) -> Iterator[Row]:
    """Labels of the device against float64, and its draws against those of the CPU."""
    for n, vocab in ((64, 1_000), (64, 49_152), (32, 262_144)) if not place.tiny else ((16, 300),):
        logits = logits_of(n, vocab)
        own, host = targets_of(logits, place.device), targets_of(logits, torch.device("cpu"))
        log_p = torch.log_softmax(logits.double(), 1)
        true = log_p.gather(1, torch.from_numpy(own.head_ids)).numpy()
        errors = [np.abs(true - own.head_logprobs).max()]
        for j, t in enumerate(TEMPERATURES):
            tempered = torch.log_softmax(logits.double() / t, 1)
            rest = tempered.scatter(1, torch.from_numpy(own.head_ids), -torch.inf).logsumexp(1).numpy()
            errors.append(np.abs(rest - own.log_tail_mass[:, j]).max())
        same_head = float((own.head_ids == host.head_ids).mean())
        same_draws = float((own.tail_ids == host.tail_ids).mean())
        figures = {
            "V": vocab,
            "largest error, nats": float(max(errors)),
            "same head": same_head,
            "same draws": same_draws,
        }
        yield Row(f"{n} positions", figures, bool(max(errors) < NATS and same_head == 1.0 and same_draws >= SAME_DRAWS))


@contextmanager
def several_slices(vocab: int) -> Iterator[None]:
    """Let the fused loss take several slices of a small batch."""
    before = fused.SLICE_LOGITS
    fused.SLICE_LOGITS = 32 * vocab
    try:
        yield
    finally:
        fused.SLICE_LOGITS = before


def losses(place: Place) -> Iterator[Row]:
    """The fused loss and all its gradients against the plain one in float64 on the CPU, by every setting."""
    n, vocab, width = (80, 200, 16) if place.tiny else (160, 8_192, 256)
    problem = Problem(n, vocab, width)
    how = LossSettings(0.4, 2.0, "sampled", "forward-kl")
    with several_slices(vocab):
        for (tail, divergence), t in itertools.product(TAILS, TEMPERATURES[:: 2 if place.tiny else 1]):
            yield problem.row(replace(how, temperature=t, tail=tail, divergence=divergence), place.device)
        for scale, softcap in ((0.5, None), (1.0, 5.0), (0.5, 3.0)):
            yield problem.row(how, place.device, scale=scale, softcap=softcap)
        yield problem.row(replace(how, alpha=1.0), place.device, labelled=False)
        yield problem.row(how, place.device, online=True)
        yield problem.row(how, place.device, each=True)


class Problem:
    """A batch of the loss: hidden states, head, labels, and the reference in float64."""

    def __init__(self, n: int, vocab: int, width: int) -> None:
        random = torch.Generator().manual_seed(2)
        self.hidden, self.teacher = (torch.randn(n, width, generator=random) for _ in range(2))
        self.weight = 2 * torch.randn(vocab, width, generator=random) / width**0.5
        self.bias = torch.randn(vocab, generator=random)
        self.gold = torch.randint(vocab, (n,), generator=random)
        self.targets = targets_of(self.teacher @ self.weight.t(), torch.device("cpu"))

    def row(
        self,
        how: LossSettings,
        device: torch.device,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        labelled: bool = True,
        online: bool = False,
        each: bool = False,
    ) -> Row:
        """Return the worst error in each dtype: of the loss, and of the gradients of hidden states, weight and bias."""
        figures, passed = {}, True
        for dtype, limit in LIMITS.items():
            tensors = [x.to(dtype) for x in (self.hidden, self.weight, self.bias)]
            labels = soft_labels(self.targets, TEMPERATURES, how.temperature, how.tail).map(torch.from_numpy)
            exact = [x.double().requires_grad_() for x in tensors]
            head = LMHead(exact[1], exact[2], scale, softcap)
            logits = head.logits(exact[0])
            if online:
                with torch.no_grad():
                    true_labels = everything(head.logits(self.teacher.to(dtype).double()), how.temperature)
            else:
                true_labels = labels.map(lambda x: x.double() if x.is_floating_point() else x)
            true = distillation_loss(logits, self.gold, true_labels if labelled else None, how).total
            own = [x.to(device).requires_grad_() for x in tensors]
            own_head, gold = LMHead(own[1], own[2], scale, softcap), self.gold.to(device)
            if each:
                found = fused_position_losses(own[0], own_head, gold, labels.to(device), how).sum()
            else:
                frozen = LMHead(own[1].detach(), own[2].detach(), scale, softcap)
                rows = (
                    TeacherRows(self.teacher.to(device, dtype), frozen, len(self.weight))
                    if online
                    else labels.to(device)
                )
                found = fused_loss(own[0], own_head, gold, rows if labelled else None, how).total
            pairs = zip(
                (found, *torch.autograd.grad(found, own)), (true, *torch.autograd.grad(true, exact)), strict=True
            )
            worst = max(relative_error(*pair) for pair in pairs)
            figures[f"error, {str(dtype).removeprefix('torch.')}"] = worst
            passed &= worst < limit
        kind = (
            "online" if online else "per position" if each else f"{how.tail}, {how.divergence}" if labelled else "hard"
        )
        return Row(f"{kind}, T={how.temperature:g}, scale {scale:g}, cap {softcap or 'none'}", figures, passed)


def everything(teacher: Tensor, t: float) -> SoftLabels[Tensor]:
    """Return labels that hold a teacher's whole distribution at T, from its logits (N, V)."""
    log_p = torch.log_softmax(teacher / t, 1)
    ids = torch.arange(teacher.shape[1]).expand(len(teacher), -1)
    return SoftLabels(
        ids, log_p.exp(), log_p, teacher.new_full((len(teacher),), -64.0), teacher.shape[1], t, "renormalize"
    )


def transferred(place: Place) -> Iterator[Row]:
    """A batch of the collator on the device against the one on the CPU, number by number, and its loss against it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from logitcask.pipeline.batches.collate import Collator, TrainingExample
    from logitcask.pipeline.text.tokens.encoded import Encoded
    from logitcask.pipeline.train.loss import kd_loss

    random, vocab = np.random.default_rng(0), 300
    examples = []
    for length in (17, 30, 12, 5):
        mask = np.arange(length) < length - 1
        targets = targets_of(logits_of(length - 1, vocab), torch.device("cpu"), 4, 8)
        examples.append(TrainingExample(Encoded(random.integers(0, vocab, length), mask), targets))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes))
    for packed in (False, True):
        batch = Collator(0, TEMPERATURES, 2.0, "sampled", packed=packed)(examples)
        with torch.no_grad():
            expected = kd_loss(model.cpu(), batch)
        cuda = place.device.type == "cuda"
        pinned = {name: part.pin_memory() if cuda else part for name, part in batch.items()}
        moved = {name: part.to(place.device, non_blocking=True) for name, part in pinned.items()}
        with torch.no_grad():
            error = relative_error(kd_loss(model.to(place.device), moved), expected)
        passed = _same(batch, moved) and error < LIMITS[torch.float32]
        yield Row("packed rows" if packed else "padded rows", {"error of the loss": error}, passed)


def _same(one: dict[str, Tensor | SoftLabels[Tensor]], other: dict[str, Tensor | SoftLabels[Tensor]]) -> bool:
    """Return whether two batches hold the same numbers."""

    def tensors(batch: dict[str, Tensor | SoftLabels[Tensor]]) -> list[Tensor]:
        parts = [batch[name] for name in sorted(batch)]
        nested = [[p] if isinstance(p, Tensor) else [getattr(p, f.name) for f in fields(p)[:4]] for p in parts]
        return [tensor.cpu() for part in nested for tensor in part]

    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
