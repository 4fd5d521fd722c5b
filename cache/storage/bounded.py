"""Objects from strangers: read within bounds, and proved sound before a decoder sees them.

A cache may come from anybody, so nothing in it is taken at its word: an object must be a plain file inside the cache
and of bounded size, and each compressed chunk must claim exactly the size that the layout gives it.
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

MAX_OBJECT = (1 << 28) + (1 << 20)  # bytes: the largest array of a shard, see manifest.MAX_SHARD_ENTRIES, and slack
MAX_JSON = 1 << 20
INDEX_ENTRY, INDEX_CHECKSUM = 16, 4  # bytes of a shard index: offset and length a chunk, and a CRC-32C
BLOSC_HEADER = struct.Struct("<4B3I")  # versions, flags, typesize; bytes decoded, bytes of a block, bytes encoded
PLAIN = "not a plain file inside the cache: copy the cache again without links"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def read_bounded(store: Store, key: str, limit: int = MAX_OBJECT) -> bytes | None:
    """The bytes of one object, None where it is missing.

    Raises CacheFormatError where it is no plain file inside the cache or larger than ``limit``, LogitcaskError where
    the system refuses to read it.
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
        raise CacheFormatError(f"{key}: larger than {limit} bytes, the most such an object may hold")
    return None if buffer is None else buffer.to_bytes()


def _require_plain_file(store: LocalStore, key: str, limit: int) -> None:
    """Links, pipes and devices are refused: they lead out of the folder or never end."""
    place = store.root / key
    try:
        found = os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        return
    require_inside(store, key)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise CacheFormatError(f"{key}: {PLAIN}")
    if stat.S_ISREG(found.st_mode) and found.st_size > limit:
        raise CacheFormatError(f"{key}: larger than {limit} bytes, the most such an object may hold")


def require_inside(store: Store, key: str) -> None:
    """Raise CacheFormatError where a folder on the way to an object is a link: none is read or deleted through."""
    if isinstance(store, LocalStore):
        folder = os.path.dirname(key)
        if os.path.realpath(store.root / folder) != os.path.normpath(
            os.path.join(os.path.realpath(store.root), folder)
        ):
            raise CacheFormatError(f"{key}: {PLAIN}")


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """A JSON object of a store, None where it is missing. Raises CacheFormatError where it is not plain JSON."""
    data = read_bounded(store, key, MAX_JSON)
    if data is None:
        return None
    try:
        found = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{key}: not the JSON that belongs there") from error
    if not isinstance(found, dict):
        raise CacheFormatError(f"{key}: not the JSON that belongs there")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class Decoder:
    """Decodes objects of one array by its layout, never by what the cache says of it."""

    def __init__(self, name: str, layout: dict[str, Any]) -> None:
        """``layout``: the arguments of ``create_array``. Raises CacheFormatError where no array can be so."""
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
        """Shape of what one object holds."""
        return self._array.shards or self._array.chunks

    def require_document(self, store: Store) -> None:
        """Raise CacheFormatError unless the array's own metadata is what the layout implies, to the last member."""
        found = read_json(store, f"{self.name}/zarr.json")
        if found is None:
            raise CacheFormatError(f"array {self.name} is missing")
        # as text: 1, 1.0 and true are equal in Python
        if json.dumps(found, sort_keys=True) != json.dumps(self._document, sort_keys=True):
            wrong = [key for key in self._document or {} if found.get(key) != (self._document or {})[key]]
            raise CacheFormatError(f"array {self.name} does not fit the manifest: {', '.join(wrong) or 'its metadata'}")

    def decode(self, key: str, data: bytes, count: int) -> np.ndarray[Any, Any]:
        """The first ``count`` slots of an object whose bytes are given; columns lie together where they are stored so.

        Raises CacheFormatError.
        """
        rows, *width = self._array.chunks
        size = math.prod(self._array.chunks) * self._array.dtype.itemsize
        (codec,), columns = self._array.compressors, bool(self._array.filters)
        parts = []
        for number, (start, end) in enumerate(self._spans(key, data)):
            chunk = memoryview(data)[start:end]
            if _claimed_size(codec, chunk) != size:
                raise CacheFormatError(f"{key}: a chunk claims another size than its layout's {size} bytes")
            if number * rows < max(1, count):  # of no slots, too, the type
                try:
                    flat = np.frombuffer(_decompress(codec, chunk), self._array.dtype.newbyteorder("<"))
                    parts.append(flat.reshape(*width, rows).T if columns else flat.reshape(rows, *width))
                except (RuntimeError, ValueError) as error:
                    raise CacheFormatError(f"{key}: cannot be decoded") from error
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[:count]

    def _spans(self, key: str, data: bytes) -> list[tuple[int, int]]:
        """Where each chunk begins and ends: end to end in any order, before the index."""
        if not self._sharded:
            return [(0, len(data))]
        body = len(data) - INDEX_ENTRY * self._chunks - INDEX_CHECKSUM
        if body <= 0:
            raise CacheFormatError(f"{key}: too short for its index of {self._chunks} chunks")
        index = np.frombuffer(data, dtype="<u8", count=2 * self._chunks, offset=body).reshape(-1, 2)
        if int(index.max()) > body:
            raise CacheFormatError(f"{key}: its index points outside it")
        spans = [(int(start), int(start) + int(length)) for start, length in index]
        ordered = sorted(spans)
        if [start for start, _ in ordered] + [body] != [0] + [end for _, end in ordered] or min(index[:, 1]) == 0:
            raise CacheFormatError(f"{key}: its chunks overlap or leave gaps")
        return spans


def _decompress(codec: object, chunk: memoryview) -> bytes:
    found: bytes = (blosc if isinstance(codec, BloscCodec) else zstd).decompress(chunk)
    return found


def _claimed_size(codec: object, chunk: memoryview) -> int:
    """Bytes that a compressed chunk claims to decode to; -1 where its header is broken."""
    if isinstance(codec, BloscCodec):
        if len(chunk) < BLOSC_HEADER.size:
            return -1
        *_, decoded, block, encoded = BLOSC_HEADER.unpack_from(chunk)
        return int(decoded) if encoded == len(chunk) and 0 < block <= decoded else -1
    assert isinstance(codec, ZstdCodec), f"no bound known for {codec}"
    return _zstd_content_size(chunk)


def _zstd_content_size(frame: memoryview) -> int:
    """The content size in a zstd frame's header (RFC 8878, 3.1.1.1); -1 where it gives none."""
    header = bytes(frame[:18]).ljust(18, b"\0")
    if header[:4] != ZSTD_MAGIC:
        return -1
    flags = header[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 6 - single + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(header[start : start + width], "little")
    return size + 256 * (width == 2) if width else -1
