"""All examples of a data set as token ids, staged on disk so that memory use does not grow with their tokens."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.cache.manifest import DataIdentity
from logitcask.pipeline.text.columns import MetadataColumns
from logitcask.pipeline.text.tokens.encoded import Encoded


@dataclass(frozen=True)
class TokenTable:
    """Examples laid end to end in two files; 12 bytes per example are in memory."""

    identity: DataIdentity
    starts: IntArray  # (E + 1,), where each example's tokens start
    positions: NDArray[np.int32]  # (E,), number of target positions of each
    _ids: NDArray[np.uint32]
    _mask: NDArray[np.uint8]
    codes: Mapping[str, NDArray[np.uint16]] = field(default_factory=dict)  # (E,) of each column of the metadata

    def __len__(self) -> int:
        return len(self.positions)

    def example(self, index: int) -> Encoded:
        """Return an example by its index in the data."""
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Encoded(self._ids[span].astype(np.int64), self._mask[span].astype(bool))


def stage_tokens(
    encoded: Iterator[Encoded], folder: Path, *, max_seq_length: int, prompt_loss: bool, source: str
) -> TokenTable:
    """Write encoded examples to ``folder``, truncated to ``max_seq_length`` tokens.

    An example without a target after truncation is dropped; the identity counts both. Raises LogitcaskError if no
    example remains.
    """
    digest = hashlib.sha256()
    lengths, positions = array("q"), array("i")  # 12 bytes per example instead of two Python objects
    truncated, dropped = 0, 0
    columns = MetadataColumns()
    with (folder / "ids").open("wb") as ids_file, (folder / "mask").open("wb") as mask_file:
        for example in encoded:
            ids, mask = example.input_ids[:max_seq_length], example.target_mask[:max_seq_length].copy()
            if len(ids) < len(example.input_ids):
                truncated += 1
                mask[-1] = False  # its next token was cut off
            if not mask.any():
                dropped += 1
                continue
            columns.add(len(lengths), example.metadata)
            lengths.append(len(ids))
            positions.append(int(mask.sum()))
            digest.update(len(ids).to_bytes(8, "little") + _write(ids_file, ids.astype("<u4")))
            digest.update(_write(mask_file, mask.astype(np.uint8)))
    if not lengths:
        raise LogitcaskError(
            f"{source}: no example has a target within --max-seq-length {max_seq_length}: raise it ({dropped} dropped)"
        )
    metadata, codes = columns.settle(len(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
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
    return TokenTable(
        identity,
        starts,
        np.array(positions, dtype=np.int32),
        np.memmap(folder / "ids", dtype="<u4", mode="r"),
        np.memmap(folder / "mask", dtype=np.uint8, mode="r"),
        codes,
    )


def _write(file: IO[bytes], values: NDArray[np.generic]) -> bytes:
    data = values.tobytes()
    file.write(data)
    return data
