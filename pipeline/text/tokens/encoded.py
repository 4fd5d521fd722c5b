"""An example as token ids."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import IntArray


@dataclass(frozen=True)
class Encoded:
    """Token ids (L,) and the target mask (L,), before truncation."""

    input_ids: IntArray
    target_mask: NDArray[np.bool_]
    metadata: Mapping[str, str] = field(default_factory=dict)  # the record's category and language
