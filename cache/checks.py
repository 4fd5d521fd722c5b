"""What the numbers of a shard must satisfy, whatever their digests say, before a student may see them."""

from collections.abc import Iterator

import numpy as np

from logitcask.cache.manifest import Manifest
from logitcask.cache.shard import Shard


def unusable(shard: Shard, manifest: Manifest) -> Iterator[str]:
    """What would crash a student or spoil its loss: ids no embedding has, a mask that fits no label, no finite number.

    Cheap enough for every read; ``cache.verify`` looks deeper.
    """
    targets, vocab = shard.targets, manifest.label.vocab_size
    for name, ids in (("input_ids", shard.input_ids), ("head_ids", targets.head_ids), ("tail_ids", targets.tail_ids)):
        if ids.size and int(ids.max()) >= vocab:
            yield f"{name}: id {int(ids.max())} is outside the vocabulary of {vocab}"
    longest = manifest.data.longest
    if int(shard.token_count.min()) < 1 or int(shard.token_count.max()) > longest:
        yield f"token_count: an example must have 1 to {longest} tokens"
        return
    ends = np.cumsum(shard.token_count)
    labelled = np.diff(np.cumsum(shard.target_mask)[ends - 1], prepend=0)
    if not np.array_equal(labelled, shard.position_count):
        yield "target_mask and position_count disagree"
    if shard.target_mask[ends - 1].any():
        yield "target_mask: the last token of an example has no next one"
    if not np.isfinite(targets.log_partition).all():
        yield "log_partition: must be finite"
    if not np.isfinite(targets.tail_logprobs).all():
        yield "tail_logprobs: must be finite"
    for name in ("head_logprobs", "log_tail_mass", "gold_logprobs"):
        if np.isnan(getattr(targets, name)).any():
            yield f"{name}: must be numbers"
