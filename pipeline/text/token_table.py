"""All examples of a data set as token ids, staged on disk so that memory use does not grow with their tokens."""

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.cache.manifest import DataIdentity
from logitcask.pipeline.text.columns import MetadataColumns
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.text.tokens.log import TokenLog
from logitcask.pipeline.text.tokens.packed import BEFORE, PER_TOKEN, PackedChunk


@dataclass(frozen=True)
class TokenTable:
    """Examples laid end to end in a file; 12 bytes per example are in memory."""

    identity: DataIdentity
    starts: IntArray  # (E + 1,), where each example's tokens start
    positions: NDArray[np.int32]  # (E,), number of target positions of each
    _tokens: NDArray[np.uint8]  # as ``tokens.packed`` has them
    codes: Mapping[str, NDArray[np.uint16]] = field(default_factory=dict)  # (E,) of each column of the metadata
    companions: IntArray | None = None  # (E + 1,), where each example's companion starts among those of all
    kinds: tuple[int, ...] = ()  # positions of each of KINDS, if the teacher's vocabulary is another one

    def __len__(self) -> int:
        return len(self.positions)

    def example(self, index: int) -> Encoded:
        """Return an example by its index in the data."""
        start, stop = map(int, self.starts[index : index + 2])
        first, last = (0, 0) if self.companions is None else map(int, self.companions[index : index + 2])
        ids = BEFORE * (index + 1) + PER_TOKEN * start + first
        mask = ids + 4 * (stop - start)
        end = mask + stop - start
        return Encoded(
            self._tokens[ids:mask].view("<u4").astype(np.int64),
            self._tokens[mask:end].astype(bool),
            companion=self._tokens[end : end + last - first].tobytes(),
        )


def write_table(
    chunks: Iterable[PackedChunk], log: TokenLog, *, max_seq_length: int, prompt_loss: bool, source: str
) -> TokenTable:
    """Write examples, truncated to ``max_seq_length`` tokens, through ``log``.

    Raises LogitcaskError if there is none.
    """
    digest = hashlib.sha256()
    lengths, positions = array("i"), array("i")  # 8 bytes per example instead of two Python objects
    companions, kinds = array("i"), [0, 0, 0]
    truncated, dropped = 0, 0
    columns = MetadataColumns()
    for packed in chunks:
        for index, values in packed.metadata:
            columns.add(len(lengths) + index, values)
        lengths.extend(packed.lengths)
        positions.extend(packed.positions)
        companions.extend(packed.companions)
        kinds = [sum(counts) for counts in zip(kinds, packed.kinds, strict=True)]
        truncated += packed.truncated
        dropped += packed.dropped
        digest.update(packed.tokens)
        log.write(packed)
    if not lengths:
        raise LogitcaskError(
            f"{source}: no example has a target within --max-seq-length {max_seq_length}: raise it ({dropped} dropped)"
        )
    log.flush()
    metadata, codes = columns.settle(len(lengths))
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.frombuffer(lengths, dtype=np.int32), out=starts[1:])
    identity = DataIdentity(
        fingerprint=digest.hexdigest(),
        examples=len(lengths),
        tokens=int(starts[-1]),
        positions=sum(positions),
        truncated=truncated,
        dropped=dropped,
        max_seq_length=max_seq_length,
        longest=max(lengths),
        prompt_loss=prompt_loss,
        metadata=metadata,
    )
    table = np.memmap(log.file, dtype=np.uint8, mode="r")
    paired = any(kinds)
    return TokenTable(
        identity,
        starts,
        np.frombuffer(positions, dtype=np.int32),
        table,
        codes,
        np.concatenate([[0], np.cumsum(np.frombuffer(companions, dtype=np.int32), dtype=np.int64)]) if paired else None,
        tuple(kinds) if paired else (),
    )
