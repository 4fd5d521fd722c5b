"""Several caches of one tokenizer, and text without labels, mixed by weight as one source."""

from collections.abc import Sequence

import numpy as np

from logitcask.pipeline.batches.examples import JoinedExamples
from logitcask.pipeline.batches.mixing import common_temperatures
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.train.sources.source import Source


def mixed_source(parts: Sequence[Source], weights: Sequence[float]) -> Source:
    """Return the parts, of which the first is a cache, as one source with the temperatures that every cache stores."""
    amounts = [part.amount for part in parts]
    totals = (sum(getattr(amount, name) for amount in amounts) for name in ("examples", "tokens", "positions"))
    caches = [part for part in parts if part.temperatures]
    soft, heads = parts[0].labelled, [part.teacher_head for part in parts]
    of = tuple(place for head in heads if isinstance(head, StoredHead) for place in head.caches)
    return Source(
        name=", ".join(part.name for part in parts),
        examples=JoinedExamples([part.examples for part in parts], [part.name for part in parts]),
        tokenizer=parts[0].tokenizer,
        vocab_size=parts[0].vocab_size,
        longest=max(part.longest for part in parts),
        temperatures=common_temperatures([part.temperatures for part in caches]) if soft else parts[0].temperatures,
        tail=parts[0].tail,
        head_size=min(part.head_size for part in caches),
        labelled=soft,
        shard_starts=np.array([0, sum(amount.examples for amount in amounts)], dtype=np.int64),
        identity=" + ".join(f"{weight:g} of {part.identity}" for part, weight in zip(parts, weights, strict=True)),
        amount=Amount(*totals),
        lengths=lambda: np.concatenate([part.lengths() for part in parts]),
        positions=lambda: np.concatenate([part.positions() for part in parts]),
        teacher_head=StoredHead(of) if of else None,
        teacher_bytes=parts[0].teacher_bytes,
        parts=tuple(parts),
        weights=tuple(weights),
    )
