"""The teacher's head that a cache of exact labels holds, read once per process and device."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.models.dense.rows import CodedHead
from logitcask.pipeline.models.head import LMHead

Caches = tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True)
class StoredHead:
    """The head of the teacher that caches have in common: where each is, and the digest of what was opened there."""

    caches: Caches

    def __call__(self, device: torch.device) -> CodedHead:
        """Return it in float32 on a device.

        Raises CacheFormatError if it is damaged, CacheMismatchError if another cache has taken the place of one.
        """
        return _coded_head(self.caches, device)


@functools.lru_cache(maxsize=2)
def _coded_head(caches: Caches, device: torch.device) -> CodedHead:
    heads = (CacheReader(path, opened=opened).teacher_head() for path, opened in caches)
    first = next(heads)
    parts = [(first.basis, first.centre), *((head.basis, head.centre) for head in heads)]  # one head's weights at once
    columns = max(len(basis) for basis, _ in parts)
    bases = np.stack([np.pad(basis, ((0, columns - len(basis)), (0, 0))) for basis, _ in parts])
    bias = None if first.bias is None else torch.from_numpy(first.bias).to(device)
    return CodedHead(
        LMHead(torch.from_numpy(first.weights()).to(device), bias, first.scale, first.softcap),
        torch.from_numpy(bases).to(device),
        torch.from_numpy(np.stack([centre for _, centre in parts])).to(device),
    )
