"""An example as token ids."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray


@dataclass(frozen=True)
class Encoded:
    """Token ids (L,) and the target mask (L,), before truncation."""

    input_ids: IntArray
    target_mask: NDArray[np.bool_]
    metadata: Mapping[str, str] = field(default_factory=dict)  # the record's category and language
    other: "Encoded | None" = None  # the same example in the teacher's vocabulary, if that is another one
    companion: bytes = b""  # what of it is staged

    def truncated(self, length: int) -> "Encoded":
        """Return the first tokens; the last is no target position if its next token was cut off."""
        if len(self.input_ids) <= length:
            return self
        mask = np.append(self.target_mask[: length - 1], False)
        return replace(self, input_ids=self.input_ids[:length], target_mask=mask)
