"""Which of a teacher's layers a student begins with: those whose removal would raise the loss most.

Layers are removed one at a time, each time the one whose removal raises the loss on a few examples least. Only the
``SHORTLIST`` layers that change their input least (block influence, of ShortGPT) are tried; a try runs the layers above
the removed one alone, from hidden states that are kept. ``tests/benchmarks/pruning.py`` compares this with trying all.

Legend: B examples, L tokens, H width, N target positions, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.pipeline.console import say, track
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.students.layers import layers_of
from logitcask.pipeline.text.tokens.encoded import Encoded

PROBE_TOKENS = 512  # of the examples that the loss is measured on, about
SHORTLIST = 4
SLICE = 256  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Probe:
    """The examples that the loss is measured on, padded to one length."""

    ids_BL: Tensor
    is_token_BL: Tensor
    is_target_BL: Tensor  # positions whose next token is a target

    @staticmethod
    def of(examples: Sequence[Encoded], device: torch.device) -> "Probe":
        """Return a probe of examples of at most ``PROBE_TOKENS`` tokens each, half of them before its first target."""
        shape = (len(examples), max(min(len(example.input_ids), PROBE_TOKENS) for example in examples))
        ids, is_token = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        is_target = torch.zeros(shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            first = max(0, int(example.target_mask.argmax()) - PROBE_TOKENS // 2)  # a prompt may be long
            chosen = slice(first, first + PROBE_TOKENS)
            length = len(example.input_ids[chosen])
            ids[row, :length] = torch.from_numpy(example.input_ids[chosen]).long()
            is_target[row, : length - 1] = torch.from_numpy(example.target_mask[chosen][:-1])
            is_token[row, :length] = True
        return Probe(ids.to(device), is_token.to(device), is_target.to(device))


@dataclass
class PartialModel:
    """A model whose layers can be left out: they pass on what they get."""

    model: PreTrainedModel
    head: LMHead
    count: int
    kept: set[int] = field(default_factory=set)
    start: int = 0
    given_BLH: Tensor | None = None
    seen: dict[int, tuple[Tensor, Tensor]] | None = None  # what each kept layer got and gave
    others: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # that a layer gives beside hidden states

    def run(self, probe: Probe, kept: Sequence[int], start: int = 0, given_BLH: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, L, H) that the head reads, of the kept layers from ``start`` on what it got."""
        self.kept, self.start, self.given_BLH = set(kept), start, given_BLH
        return last_hidden_states(self.model, probe.ids_BL)

    def between(
        self, probe: Probe, kept: Sequence[int], start: int = 0, given_BLH: Tensor | None = None
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
        """Return what each kept layer from ``start`` on gets and gives, and the hidden states that the head reads."""
        self.seen = {}
        last = self.run(probe, kept, start, given_BLH)
        seen, self.seen = self.seen, None
        return seen, last

    def loss(self, probe: Probe, hidden_BLH: Tensor) -> float:
        """Return the mean loss of the next token over the N target positions, in nats."""
        gold_N = probe.ids_BL.roll(-1, 1)[probe.is_target_BL]
        slices = zip(torch.split(hidden_BLH[probe.is_target_BL], SLICE), torch.split(gold_N, SLICE), strict=True)
        parts = [cross_entropy(self.head.logits(h).float(), gold, reduction="sum").double() for h, gold in slices]
        return float(torch.stack(parts).sum()) / len(gold_N)

    def layer(self, index: int, own: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return what a layer gives: what its ``own`` forward does, or what it gets if it is left out."""
        hidden = args[0] if args else named["hidden_states"]
        if index == self.start and self.given_BLH is not None:
            hidden = self.given_BLH
        output = hidden
        if index >= self.start and index in self.kept:
            whole = own(hidden, *args[1:], **{name: v for name, v in named.items() if name != "hidden_states"})
            output = whole[0] if isinstance(whole, tuple) else whole
            if isinstance(whole, tuple):
                self.others[index] = whole[1:]
            if self.seen is not None:
                self.seen[index] = (hidden, output)
        return (output, *self.others[index]) if index in self.others else output


@contextlib.contextmanager
def partial_model(model: PreTrainedModel) -> Iterator[PartialModel]:
    """Yield a model whose layers can be left out, without gradients; afterwards it is as it was."""
    _, layers = layers_of(model)
    was_training = model.training
    model.eval()
    partial = PartialModel(model, read_head(model), len(layers))

    def forward(index: int, own: Any) -> Any:
        return lambda *args, **named: partial.layer(index, own, args, named)

    for index, layer in enumerate(layers):
        layer.forward = forward(index, layer.forward)
    try:
        with torch.no_grad():
            yield partial
    finally:
        for layer in layers:
            del layer.forward  # the class's own is found again
        model.train(was_training)


def influence(probe: Probe, seen: dict[int, tuple[Tensor, Tensor]]) -> dict[int, float]:
    """Return how much each layer changes what it gets: 1 less the mean cosine of its input and output."""
    mask = probe.is_token_BL
    return {i: float(1 - cosine_similarity(x[mask], y[mask], dim=-1).double().mean()) for i, (x, y) in seen.items()}


def losses_without(
    partial: PartialModel, probe: Probe, kept: Sequence[int], tried: Sequence[int], seen: dict[int, Any]
) -> dict[int, float]:
    """Return the loss without each of the tried layers, of the kept ones; ``seen``: what these got."""
    return {
        i: partial.loss(probe, partial.run(probe, [k for k in kept if k != i], start=i, given_BLH=seen[i][0]))
        for i in tried
    }


def choose_layers(model: PreTrainedModel, examples: Sequence[Encoded], count: int) -> list[int]:
    """Return the numbers, ascending, of the ``count`` layers to keep; say which, and their loss on the examples.

    Raises LogitcaskError if the model has fewer layers, or they cannot be left out one by one.
    """
    option = f"--init-from-teacher-layers auto:{count}"
    with partial_model(model) as partial:
        if not 1 <= count <= partial.count:
            raise LogitcaskError(f"{option}: the teacher has {partial.count} layers: keep at most as many")
        probe = Probe.of(examples, next(model.parameters()).device)
        try:
            kept, before, after = _remove_down_to(partial, probe, count)
        except Exception as error:  # layers that pass more between them than hidden states
            if out_of_memory(error):
                raise
            raise LogitcaskError(
                f"{option}: layers of {type(model).__name__} cannot be left out one by one: {shown_reason(error)}: "
                "name those to keep, such as 0,9,19"
            ) from error
    say(f"{len(kept)} of {partial.count}: {','.join(map(str, kept))}: loss {before:.3f} -> {after:.3f} nats", "layers")
    return kept


def _remove_down_to(partial: PartialModel, probe: Probe, count: int) -> tuple[list[int], float, float]:
    """Return the layers that are left, and the loss with all of them and with these."""
    kept = list(range(partial.count))
    seen, last = partial.between(probe, kept)
    before = after = partial.loss(probe, last)
    with track("choosing layers", partial.count - count, "layers") as advance:
        while len(kept) > count:
            changes = influence(probe, seen)
            tried = sorted(sorted(kept, key=lambda i: changes[i])[:SHORTLIST])
            losses = losses_without(partial, probe, kept, tried, seen)
            removed = min(tried, key=lambda i: losses[i])
            kept.remove(removed)
            after = losses[removed]
            advance(1)
            below = {i: seen[i] for i in kept if i < removed}
            seen = below | partial.between(probe, kept, start=removed, given_BLH=seen[removed][0])[0]
    return kept, before, after
