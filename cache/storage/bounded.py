"""Untrusted objects: read within bounds, and checked before a decoder sees them.

A cache may come from anybody, so nothing in it is trusted: an object must be a plain file inside the cache and of
bounded size, and each compressed chunk must declare exactly the decoded size that the layout gives it.
"""

import json
import math
import os
import stat
import struct
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc, zstd
from zarr.abc.store import RangeByteRequest, Store
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from logitcask.cache.errors import CacheFormatError, LogitcaskError

MAX_OBJECT = (1 << 28) + (1 << 20)  # bytes: the largest object of manifest.MAX_SHARD_ENTRIES, and slack
MAX_JSON = 1 << 20
INDEX_ENTRY, INDEX_CHECKSUM = 16, 4  # bytes in a shard index: offset and length per chunk, then a CRC-32C
BLOSC_HEADER = struct.Struct("<4B3I")  # versions, flags, typesize; bytes decoded, per block, encoded
PLAIN = "not a plain file inside the cache: copy the cache again without links"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def read_bounded(store: Store, key: str, limit: int = MAX_OBJECT) -> bytes | None:
    """Return the bytes of one object, None if it is missing.

    Raises CacheFormatError if it is not a plain file inside the cache or is larger than ``limit`` bytes, LogitcaskError
    if the system refuses to read it.
    """
    try:
        if isinstance(store, LocalStore):
            _require_plain_file(store, key, limit)
            return (store.root / key).read_bytes()
        window = RangeByteRequest(0, limit + 1)
        buffer = sync(store.get(key, prototype=default_buffer_prototype(), byte_range=window))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise LogitcaskError(f"{key}: cannot be read: {error.strerror or error}") from error
    if buffer is not None and len(buffer) > limit:
        raise CacheFormatError(f"{key}: must be at most {limit} bytes")
    return None if buffer is None else buffer.to_bytes()


def _require_plain_file(store: LocalStore, key: str, limit: int) -> None:
    """Refuse links, pipes and devices: they lead out of the folder or never end."""
    try:
        status = os.lstat(store.root / key)
    except (FileNotFoundError, NotADirectoryError):
        return
    require_inside(store, key)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise CacheFormatError(f"{key}: {PLAIN}")
    if stat.S_ISREG(status.st_mode) and status.st_size > limit:
        raise CacheFormatError(f"{key}: must be at most {limit} bytes")


def require_inside(store: Store, key: str) -> None:
    """Raise CacheFormatError if a folder on the path to an object is a link: never read or delete through one."""
    if isinstance(store, LocalStore):
        folder = os.path.dirname(key)
        if os.path.realpath(store.root / folder) != os.path.normpath(
            os.path.join(os.path.realpath(store.root), folder)
        ):
            raise CacheFormatError(f"{key}: {PLAIN}")


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Return a JSON object of a store, None if it is missing. Raises CacheFormatError if it is not plain JSON."""
    data = read_bounded(store, key, MAX_JSON)
    if data is None:
        return None
    try:
        document = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{key}: must be a JSON object without repeated names") from error
    if not isinstance(document, dict):
        raise CacheFormatError(f"{key}: must be a JSON object without repeated names")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name is repeated")
    return members


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class Decoder:
    """Decodes objects of one array by its known layout, never by the metadata in the cache."""

    def __init__(self, name: str, layout: dict[str, Any]) -> None:
        """Take the arguments of ``create_array`` as ``layout``. Raises CacheFormatError if no array can have it."""
        self.name = name
        memory = MemoryStore()
        try:
            self._array = zarr.create_array(memory, name=name, fill_value=0, **layout)
        except (ValueError, TypeError, OverflowError) as error:
            raise CacheFormatError(f"{name}: its shape in the manifest is impossible") from error
        self._chunks = math.prod(self.shard_shape) // math.prod(self._array.chunks)
        self._sharded = self._array.shards is not None
        self._document = read_json(memory, f"{name}/zarr.json")

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of the values in one object."""
        return self._array.shards or self._array.chunks

    def require_document(self, store: Store) -> None:
        """Raise CacheFormatError unless the array's metadata is exactly what the layout implies."""
        document = read_json(store, f"{self.name}/zarr.json")
        if document is None:
            raise CacheFormatError(f"array {self.name} is missing")
        # compared as text, since 1, 1.0 and true are equal in Python
        if json.dumps(document, sort_keys=True) != json.dumps(self._document, sort_keys=True):
            wrong = [key for key in self._document or {} if document.get(key) != (self._document or {})[key]]
            raise CacheFormatError(f"array {self.name} does not fit the manifest: {', '.join(wrong) or 'its metadata'}")

    def decode(self, key: str, data: bytes, count: int) -> np.ndarray[Any, Any]:
        """Return the first ``count`` slots of an object from its bytes, in column order if they are stored so.

        Raises CacheFormatError if the bytes do not fit the layout.
        """
        rows, *width = self._array.chunks
        dtype = self._array.dtype.newbyteorder("<")
        size = math.prod(self._array.chunks) * self._array.dtype.itemsize
        (codec,), columns = self._array.compressors, bool(self._array.filters)
        values: np.ndarray[Any, Any] = (
            np.empty((*width, count), dtype).T if columns else np.empty((count, *width), dtype)
        )
        for number, (start, end) in enumerate(self._spans(key, data)):
            chunk = memoryview(data)[start:end]
            if _declared_size(codec, chunk) != size:
                raise CacheFormatError(f"{key}: a chunk declares another size than its layout's {size} bytes")
            if (first := number * rows) < count:
                try:
                    flat = np.frombuffer(_decompress(codec, chunk), dtype)
                    part = flat.reshape(*width, rows).T if columns else flat.reshape(rows, *width)
                    values[first : first + rows] = part[: count - first]
                except (RuntimeError, ValueError) as error:
                    raise CacheFormatError(f"{key}: cannot be decoded") from error
        return values

    def _spans(self, key: str, data: bytes) -> list[tuple[int, int]]:
        """Return where each chunk starts and ends: back to back in any order, before the index."""
        if not self._sharded:
            return [(0, len(data))]
        body = len(data) - INDEX_ENTRY * self._chunks - INDEX_CHECKSUM
        if body <= 0:
            raise CacheFormatError(f"{key}: too short for an index of {self._chunks} chunks")
        index = np.frombuffer(data, dtype="<u8", count=2 * self._chunks, offset=body).reshape(-1, 2)
        if int(index.max()) > body:
            raise CacheFormatError(f"{key}: its index points outside it")
        spans = [(int(start), int(start) + int(length)) for start, length in index]
        ordered = sorted(spans)
        if [start for start, _ in ordered] + [body] != [0] + [end for _, end in ordered] or min(index[:, 1]) == 0:
            raise CacheFormatError(f"{key}: its chunks overlap or leave gaps")
        return spans


def _decompress(codec: object, chunk: memoryview) -> bytes:
    data: bytes = (blosc if isinstance(codec, BloscCodec) else zstd).decompress(chunk)
    return data


def _declared_size(codec: object, chunk: memoryview) -> int:
    """Return the decoded size that a compressed chunk declares, in bytes; -1 if its header is invalid."""
    if isinstance(codec, BloscCodec):
        if len(chunk) < BLOSC_HEADER.size:
            return -1
        *_, decoded, block, encoded = BLOSC_HEADER.unpack_from(chunk)
        return int(decoded) if encoded == len(chunk) and 0 < block <= decoded else -1
    assert isinstance(codec, ZstdCodec), f"no bound known for {codec}"
    return _zstd_content_size(chunk)


def _zstd_content_size(frame: memoryview) -> int:
    """Return the content size in a zstd frame's header (RFC 8878, 3.1.1.1), in bytes; -1 if it declares none."""
    header = bytes(frame[:18]).ljust(18, b"\0")
    if header[:4] != ZSTD_MAGIC:
        return -1
    flags = header[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 6 - single + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(header[start : start + width], "little")
    return size + 256 * (width == 2) if width else -1
