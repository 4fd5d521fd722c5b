"""The teacher's head, as a cache of exact labels stores it once, and the hidden states that it reads.

The logits of a hidden state h are z = scale * (W h + b), soft-capped if the teacher caps them. The weights W are stored
in bfloat16, which for most teachers is their own type: in 8 bits they would be the largest error of a fine label.

Legend: N target positions, V vocabulary, W width of the hidden state, C coefficients kept of it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec

from logitcask.cache.errors import CacheFormatError
from logitcask.cache.labels import ExactTargets, FloatArray
from logitcask.cache.manifest import HeadIdentity, LabelSettings, Manifest
from logitcask.cache.storage.bounded import Decoder, read_bounded

GROUP = "head"
LEVEL = 3  # of zstd: weights are noise, a higher level takes longer and saves nothing
OBJECT_BYTES = 1 << 25  # of each object of the weights
MOST = 1e6  # of any number: what is decoded stays finite
SIGN, LARGEST_WEIGHT = np.uint16(0x8000), 0x4974  # of bfloat16: the sign's bit, and the bits of about 1e6
Layout = dict[str, Any]


@dataclass(frozen=True)
class TeacherHead:
    """What turns the codes of exact labels into hidden states, and hidden states into logits."""

    weight: NDArray[np.uint16]  # (V, W) the bits of bfloat16 numbers: the upper half of those of a float32
    bias: FloatArray | None  # (V,)
    scale: float
    softcap: float | None
    basis: FloatArray  # (C, W) h = coefficients @ basis + centre
    forward: FloatArray  # (W, C) coefficients = (h - centre) @ forward, to code other hidden states
    centre: FloatArray  # (W,)

    @property
    def identity(self) -> HeadIdentity:
        """What a manifest says of it."""
        sums = hashlib.sha256()
        for array in self.arrays().values():
            sums.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).data)
        return HeadIdentity(scale=self.scale, softcap=self.softcap, bias=self.bias is not None, digest=sums.hexdigest())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is stored, by name in the group."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {
            "weight": self.weight, **bias,
            "basis": self.basis, "forward": self.forward, "centre": self.centre,
        }  # fmt: skip

    def weights(self, rows: slice = slice(None)) -> FloatArray:
        """Return the weights of some tokens, (rows, W)."""
        return (self.weight[rows].astype(np.uint32) << 16).view(np.float32)

    def logits(self, hidden: FloatArray, rows: slice = slice(None)) -> FloatArray:
        """Return the logits of hidden states (N, W) for some tokens, (N, rows): the plain form, for tests."""
        raw: FloatArray = hidden @ self.weights(rows).T
        if self.bias is not None:
            raw = raw + self.bias[rows]
        raw = raw * np.float32(self.scale)
        if self.softcap is None:
            return raw
        capped: FloatArray = np.tanh(raw / np.float32(self.softcap)) * np.float32(self.softcap)
        return capped


def decode(targets: ExactTargets, head: TeacherHead) -> FloatArray:
    """Return the hidden states of labels, (N, W)."""
    coefficients: FloatArray = np.multiply(targets.codes, targets.steps[:, None], dtype=np.float32)
    return coefficients @ head.basis + head.centre


def as_bfloat16(values: FloatArray) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 numbers, ties to even; numbers must be finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


def layouts(label: LabelSettings, head: HeadIdentity) -> dict[str, Layout]:
    """Return the arguments of ``create_array`` for each array of the group, in the order of the digest."""
    assert label.exact is not None
    v, w, c = label.vocab_size, label.exact.width, sum(label.exact.columns)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "weight": ((v, w), "uint16"),
        **({"bias": ((v,), "float32")} if head.bias else {}),
        "basis": ((c, w), "float32"),
        "forward": ((w, c), "float32"),
        "centre": ((w,), "float32"),
    }
    return {name: _layout(*each) for name, each in shapes.items()}


def _layout(shape: tuple[int, ...], dtype: str) -> Layout:
    row = int(np.dtype(dtype).itemsize * np.prod(shape[1:], dtype=np.int64))
    rows = max(1, min(shape[0], OBJECT_BYTES // row))
    codec = BloscCodec(cname="zstd", clevel=LEVEL, shuffle="shuffle")
    return {"shape": shape, "chunks": (rows, *shape[1:]), "dtype": dtype, "compressors": codec}


def chunk_keys(name: str, layout: Layout) -> list[str]:
    """Return the keys of an array's objects inside the group, in order."""
    count = -(-layout["shape"][0] // layout["chunks"][0])
    return [f"{name}/c/{index}" + "/0" * (len(layout["shape"]) - 1) for index in range(count)]


def head_objects(manifest: Manifest) -> tuple[list[str], list[str]]:
    """Return the keys of the head's metadata and of its content; none in a cache of sparse labels."""
    if manifest.teacher_head is None:
        return [], []
    parts = layouts(manifest.label, manifest.teacher_head)
    metadata = [f"{GROUP}/zarr.json", *(f"{GROUP}/{name}/zarr.json" for name in parts)]
    return metadata, [f"{GROUP}/{key}" for name, layout in parts.items() for key in chunk_keys(name, layout)]


def read_array(store: Store, name: str, layout: Layout) -> NDArray[Any]:
    """Return an array of the head from a store, read object by object. Raises CacheFormatError if it is damaged."""
    decoder = Decoder(f"{GROUP}/{name}", layout)
    decoder.require_document(store)
    rows, length = decoder.shard_shape[0], layout["shape"][0]
    array = np.empty(layout["shape"], layout["dtype"])
    for index, key in enumerate(f"{GROUP}/{key}" for key in chunk_keys(name, layout)):
        data = read_bounded(store, key)
        if data is None:
            raise CacheFormatError(f"{key}: missing")
        part = array[index * rows : min((index + 1) * rows, length)]
        part[:] = decoder.decode(key, data, len(part))
    return array


def head_of(identity: HeadIdentity, arrays: Mapping[str, NDArray[Any]]) -> TeacherHead:
    """Return a head from its stored arrays. Raises CacheFormatError if they are others, or spoil a student's loss."""
    parts: dict[str, Any] = {"bias": None, **arrays}
    head = TeacherHead(**parts, scale=identity.scale, softcap=identity.softcap)
    if head.identity != identity:
        raise CacheFormatError(f"{GROUP} is damaged: its digest differs from the manifest's")
    for name, array in arrays.items():
        most = LARGEST_WEIGHT if name == "weight" else MOST
        magnitudes = array & ~SIGN if name == "weight" else np.abs(array)
        if not magnitudes.max() <= most:
            raise CacheFormatError(f"{GROUP}/{name}: must be finite numbers, at most {MOST:g}")
    return head
