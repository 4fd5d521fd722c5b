"""Examples as bytes: what is left of records that follow each other, after truncation.

Of each example: its length L (4 bytes) and that of its companion (4 bytes), L token ids (4 bytes each), the target mask
(L bytes), the companion.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np

from logitcask.pipeline.text.bad_records import Notices

BEFORE, PER_TOKEN = 8, 5  # bytes before an example's tokens, and of each token
KINDS = ("aligned", "straddling", "unlabelled")  # of positions labelled in another vocabulary than the teacher's


@dataclass
class PackedChunk:
    """Examples with a target within ``max_seq_length`` tokens, and what else came of their records."""

    tokens: bytes = b""
    lengths: "array[int]" = field(default_factory=lambda: array("i"))  # tokens of each example
    positions: "array[int]" = field(default_factory=lambda: array("i"))  # target positions of each
    companions: "array[int]" = field(default_factory=lambda: array("i"))  # bytes of the companion of each
    truncated: int = 0
    dropped: int = 0
    metadata: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the examples that have any
    kinds: list[int] = field(default_factory=lambda: [0, 0, 0])  # positions of each of KINDS
    bad: list[tuple[int, str]] = field(default_factory=list)  # index among the records and reason of each bad one
    notices: Notices = field(default_factory=Notices)
    key: str | None = None  # the records' digest; None: they are not recognised later
    stored: bool = False  # whether an earlier run wrote them


def unpack_sizes(tokens: bytes) -> tuple["array[int]", "array[int]", "array[int]"]:
    """Return the length, the number of target positions and the bytes of the companion of each example."""
    at, lengths, positions, companions = 0, array("i"), array("i"), array("i")
    while at < len(tokens):
        length, companion = (int.from_bytes(tokens[at + place : at + place + 4], "little") for place in (0, 4))
        mask = np.frombuffer(tokens, dtype=np.uint8, count=length, offset=at + BEFORE + 4 * length)
        lengths.append(length)
        positions.append(int(np.count_nonzero(mask)))
        companions.append(companion)
        at += BEFORE + PER_TOKEN * length + companion
    return lengths, positions, companions
