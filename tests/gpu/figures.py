"""How fast, and in how much memory: capture, the loss, whole steps, reading, torch.compile.

Legend: N positions, H width, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models.fused_loss import fused_loss
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.models.losses import LossSettings
from tests.gpu.rows import Cost, Place, Row, Way, costs, free, ratio

PLAIN, OURS, FULL = "plain cross-entropy", "ours", "full-logits KD"
HYBRID = LossSettings(alpha=0.5, temperature=2.0, tail="sampled", divergence="forward-kl")
HEAD, ENTRIES = 8, 32  # the standard preset
VOCABULARY, WIDTH = 49_152, 2_048


def labels(n: int, vocab: int, device: torch.device) -> SoftLabels[Tensor]:
    """Return labels of the standard preset's shape; their values do not affect the cost."""
    ids = torch.stack([torch.randperm(vocab)[:ENTRIES] for _ in range(16)]).repeat(-(-n // 16), 1)[:n]
    weights = torch.full((n, ENTRIES), 1 / ENTRIES)
    parts = SoftLabels(ids, weights, torch.full((n, ENTRIES), -3.0), -torch.ones(n), HEAD, 2.0)
    return parts.to(device)


def captures(place: Place) -> Iterator[Row]:
    """Stage 1 against a bare forward pass that makes the same logits and drops them, in bfloat16."""
    from logitcask.pipeline.models.load import load_causal_lm, student_from_config
    from tests.gpu.stages import as_teacher, label_settings, random_batch, real_teacher

    path = real_teacher()
    makers: dict[str, Callable[[], Any]] = {"tiny": lambda: student_from_config(Path("tiny"), 300)}
    if not place.tiny:
        makers = {"Llama of 1B, random": lambda: student_from_config(Path("1b"), VOCABULARY)}
        if path is not None:
            makers["SmolLM2-135M, GGUF"] = lambda: load_causal_lm(str(path), dtype=torch.float32)
    sequences, length = (2, 32) if place.tiny else (16, 1_024)
    for name, make in makers.items():
        model = make()
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        teacher, batch = as_teacher(model, place.device, torch.bfloat16), random_batch(sequences, length, vocabulary)
        ids = torch.stack([torch.from_numpy(example.input_ids) for example in batch])

        def bare(model: Any = model, ids: Tensor = ids) -> None:
            with torch.inference_mode():
                model(ids.to(place.device), use_cache=False)

        def capture(teacher: Any = teacher, batch: Any = batch, vocabulary: int = vocabulary) -> None:
            teacher.label(batch, label_settings(vocabulary))

        spent = costs({"bare": bare, "capture": capture}, place.device, 2 if place.tiny else 5)
        rates = {f"{way}, tokens/s": sequences * length / cost.seconds for way, cost in spent.items() if cost.seconds}
        figures = {**rates, "capture / bare": ratio(spent["bare"], spent["capture"])}
        yield Row(name, {**figures, "capture, MB": spent["capture"].mb, "bare, MB": spent["bare"].mb})
        del model, teacher
        free(place.device)


def loss_costs(place: Place) -> Iterator[Row]:
    """Forward and backward of each loss from hidden states (N, H) in bf16 with a head (V, H), by V and N."""
    sizes = [(v, n) for n in (1_024, 8_192, 65_536) for v in (32_000, 128_256, 262_144)]
    for vocab, n in [(300, 32)] if place.tiny else sizes:
        ways = loss_ways(vocab, n, 32 if place.tiny else WIDTH, place.device)
        spent = costs(ways, place.device, 2 if place.tiny else 5)
        figures = {name: value for way, cost in spent.items() for name, value in cost.figures(way).items()}
        ratios = {f"ours / {way}": ratio(spent[OURS], spent[way]) for way in (PLAIN, FULL)}
        yield Row(f"V={vocab:,}, N={n:,}", {**figures, **ratios})


def loss_ways(vocab: int, n: int, width: int, device: torch.device) -> dict[str, Way]:
    """Return the ways to compare; full-logits KD has a teacher of the same width, whose logits it computes."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(n, width, **options).requires_grad_()
    weight = (torch.randn(vocab, width, **options) / width**0.5).requires_grad_()
    teacher = torch.randn(n, width, **options)
    gold, sparse = torch.randint(vocab, (n,), device=device), labels(n, vocab, device)

    def backward(loss: Tensor) -> None:
        hidden.grad = weight.grad = None
        torch.autograd.backward(loss / n)

    def full() -> Tensor:
        t, logits = HYBRID.temperature, (hidden @ weight.t()).float()
        log_p = functional.log_softmax((teacher @ weight.detach().t()).float() / t, 1)
        soft = functional.kl_div(functional.log_softmax(logits / t, 1), log_p, reduction="sum", log_target=True)
        return 0.5 * functional.cross_entropy(logits, gold, reduction="sum") + 0.5 * t * t * soft

    head = LMHead(weight, None, 1.0, None)
    return {
        PLAIN: lambda: backward(functional.cross_entropy((hidden @ weight.t()).float(), gold, reduction="sum")),
        OURS: lambda: backward(fused_loss(hidden, head, gold, sparse, HYBRID).total),
        FULL: lambda: backward(full()),
    }


def student_step(name: str, place: Place, batch: tuple[int, int], *, plain: bool, compiled: bool = False) -> Way:
    """Return a whole step of a new student in bf16 with AdamW: plain cross-entropy by transformers, or ours."""
    from logitcask.pipeline.models.load import student_from_config
    from logitcask.pipeline.train.loss import make_loss_forward

    rows, length = batch
    vocab = 300 if place.tiny else VOCABULARY
    ids = torch.randint(vocab, (rows, length), device=place.device)
    at = torch.arange(rows * length, device=place.device).view(rows, length)[:, :-1].reshape(-1)
    n = len(at)
    soft = labels(n, vocab, place.device)
    inputs = {"input_ids": ids, "target_index": at, "gold": ids.view(-1)[at + 1], "soft_labels": soft}
    student: Any = student_from_config(Path(name), vocab).to(place.device).train()
    if not plain:
        make_loss_forward(student, HYBRID)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    model = torch.compile(student, backend="eager" if place.tiny else "inductor") if compiled else student

    def run() -> None:
        with torch.autocast(place.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss if plain else model(**inputs).total / n
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return run


def steps(place: Place) -> Iterator[Row]:
    """A whole step of students of 100M and 1B, 8 x 1,024 tokens, against plain cross-entropy."""
    for name, batch in [("tiny", (2, 32))] if place.tiny else [("100m", (8, 1_024)), ("1b", (8, 1_024))]:
        yield step_row(name, place, batch)


def step_row(name: str, place: Place, batch: tuple[int, int], *, compiled: bool = False) -> Row:
    """Return the row of a student's step, one way after the other: two students of 1B need not fit together."""
    spent: dict[str, Cost] = {}
    for way in (PLAIN, OURS):
        ways = {way: student_step(name, place, batch, plain=way == PLAIN, compiled=compiled)}
        spent |= costs(ways, place.device, 2 if place.tiny else 5)
        del ways
        free(place.device)
    figures = {each: value for way, cost in spent.items() for each, value in cost.figures(way).items()}
    rates = {f"{way}, tokens/s": batch[0] * batch[1] / cost.seconds for way, cost in spent.items() if cost.seconds}
    return Row(name, {**figures, **rates, "ours / plain": ratio(spent[OURS], spent[PLAIN])})


def compiled(place: Place) -> Iterator[Row]:
    """The step of 100M compiled, as ``train --torch-compile`` does."""
    name, batch = ("tiny", (1, 16)) if place.tiny else ("100m", (8, 1_024))
    yield step_row(name, place, batch, compiled=True)


def loading(place: Place) -> Iterator[Row]:
    """The loader's own time for a batch of a cache, moved to the device, beside a step on a batch of that size."""
    import logitcask as lc
    from tests.benchmarks.reading import LENGTH, examples, from_cache
    from tests.support.tiny import make_cache

    rows, length = (4, 32) if place.tiny else (64, LENGTH)
    make_cache(place.folder) if place.tiny else from_cache(place.folder / "cache", examples())
    times = []
    for _ in range(2 if place.tiny else 5):
        began, batches = time.perf_counter(), 0
        for batch in lc.loader(lc.open(str(place.folder / "cache")), rows, 2.0):
            _ = {name: part.to(place.device, non_blocking=True) for name, part in batch.items()}
            batches += 1
        times.append((time.perf_counter() - began) / batches)
    spent = costs(
        {OURS: student_step("tiny" if place.tiny else "100m", place, (rows, length), plain=False)}, place.device, 3
    )
    step = spent[OURS].seconds
    share = None if step is None else median(times) / step
    yield Row(f"{rows} x {length}", {"a batch, s": median(times), "a step of 100m, s": step, "batch / step": share})
