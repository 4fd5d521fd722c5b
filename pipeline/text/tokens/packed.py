"""Examples as bytes: what is left of records that follow each other, after truncation.

Of each example: its length L (8 bytes), L token ids (4 bytes each), the target mask (L bytes).
"""

from array import array
from dataclasses import dataclass, field

import numpy as np

from logitcask.pipeline.text.bad_records import Notices

BEFORE, PER_TOKEN = 8, 5  # bytes before an example's tokens, and of each token


@dataclass
class PackedChunk:
    """Examples with a target within ``max_seq_length`` tokens, and what else came of their records."""

    tokens: bytes = b""
    lengths: "array[int]" = field(default_factory=lambda: array("i"))  # tokens of each example
    positions: "array[int]" = field(default_factory=lambda: array("i"))  # target positions of each
    truncated: int = 0
    dropped: int = 0
    metadata: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the examples that have any
    bad: list[tuple[int, str]] = field(default_factory=list)  # index among the records and reason of each bad one
    notices: Notices = field(default_factory=Notices)
    key: str | None = None  # the records' digest; None: they are not recognised later
    stored: bool = False  # whether an earlier run wrote them


def unpack_sizes(tokens: bytes) -> tuple["array[int]", "array[int]"]:
    """Return the length and the number of target positions of each example."""
    at, lengths, positions = 0, array("i"), array("i")
    while at < len(tokens):
        length = int.from_bytes(tokens[at : at + BEFORE], "little")
        mask = np.frombuffer(tokens, dtype=np.uint8, count=length, offset=at + BEFORE + 4 * length)
        lengths.append(length)
        positions.append(int(np.count_nonzero(mask)))
        at += BEFORE + PER_TOKEN * length
    return lengths, positions
