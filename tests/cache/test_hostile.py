"""Untrusted caches: whatever the bytes, every call succeeds or raises a one-line error, within bounded memory."""

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.integrity import commit_key, constant_objects, shard_keys
from logitcask.cache.layout import shard_specs
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.cache.storage.zip import pack
from logitcask.cache.verify import repair, verify
from tests.cache.test_cache import label_settings, manifest_of, write
from tests.support.nightly import times
from tests.support.tiny import folder_bytes, sound_shards

Objects = dict[str, bytes]
LABEL = label_settings(300, 3, 4)
MANIFEST = manifest_of(LABEL, sound_shards(LABEL, [2, 1]))[0]
SPECS = shard_specs(MANIFEST)
CASES = int(os.environ.get("LOGITCASK_FUZZ_CASES", times(1000, 2500)))  # `just fuzz` takes 10,000
METADATA_CASES, OBJECT_CASES, NUMBER_CASES, ZIP_CASES = (round(CASES * share) for share in (0.67, 0.16, 0.05, 0.12))
CASE_MEMORY, CASE_SECONDS = 1 << 30, 30  # most that a case may take: bytes on top of what the process has, and seconds
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**40, 2**63, 2**64, 10**400, 0.5, float("nan"), 1e999, "", "x" * 5000, "\x00\n\r"),
    *([], {}, [[]], "object", "|O", "float16", "string", "variable_length_utf8", "r*", "../../etc", "a/b", "\ud800"),
    {"name": "numcodecs.pickle", "configuration": {}},
    {"name": "zstd", "configuration": {"level": 10**9}},
    {"name": "fixed_length_utf32", "configuration": {"length_bytes": 2**40}},
    {"name": "sharding_indexed", "configuration": {"chunk_shape": [1], "codecs": [], "index_codecs": []}},
    {"name": "rectilinear", "configuration": {"chunk_shapes": [[1]]}},
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """A small sound cache, so that only what a case changes is wrong."""
    folder = tmp_path_factory.mktemp("hostile") / "c"
    write(folder, LABEL, sound_shards(LABEL, [2, 1]))
    assert verify(folder).problems == []
    return folder_bytes(folder)


@pytest.fixture(scope="module")
def good_zip(good: Objects, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("zip")
    pack(on_disk(good, folder / "c"), folder / "c.zip")
    assert verify(folder / "c.zip").problems == []
    return (folder / "c.zip").read_bytes()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit a case: more memory is a MemoryError, more time an AssertionError."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {CASE_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (now + CASE_MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def store_of(objects: Objects) -> MemoryStore:
    buffer = default_buffer_prototype().buffer
    return MemoryStore({key: buffer.from_bytes(data) for key, data in objects.items()})


def sign(objects: Objects) -> None:
    """Recompute every digest, as a stranger would: plan, commit records, seal."""

    def digest(key: str) -> bytes:
        return hashlib.sha256(objects.get(key, b"")).digest()

    for index in range(2):
        objects[commit_key(index)] = b"".join(digest(key) for key in shard_keys(SPECS, index))
    objects["seal/c/0/0"] = b"".join(digest(key) for key in constant_objects(MANIFEST))


def calls(place: MemoryStore | Path) -> list[Callable[[], object]]:
    """Return every public call, each with a new reader."""
    return [
        lambda: CacheReader(place, partial=True).example(2),
        lambda: CacheReader(place).shard(0),
        lambda: CacheReader(place, partial=True).counts("token_count", range(1)),
        lambda: CacheReader(place, partial=True).tokenizer_files(),
        lambda: verify(place),
    ]


def must_answer(place: MemoryStore | Path, chance: random.Random | None = None) -> int:
    """Make every call; return how many were refused. Anything but success or a one-line LogitcaskError is a bug."""
    refused = 0
    for call in chance.sample(calls(place), 2) if chance else calls(place):
        try:
            with bounded():
                call()
        except LogitcaskError as error:
            refused += 1
            message = str(error)
            if "\n" in message or len(message) > 1000:
                raise AssertionError(f"not one line: {message!r}") from error
    return refused


def mutate_json(chance: random.Random, data: bytes) -> bytes:
    """Change, drop, add or nest a member anywhere in a JSON document, or break the text itself."""
    kind = chance.randrange(12)
    if kind == 0:
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    if kind == 1:
        return data.replace(b"{", b'{"zarr_format":2,"zarr_format":3,', 1)
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(document)
    holder, key = chance.choice(places)
    if kind == 2 and isinstance(holder, dict):
        holder[chance.choice(["extra", "a\nb", "consolidated_metadata", "x" * 3000])] = chance.choice(ODD)
    elif kind == 3:
        del holder[key]
    else:
        holder[key] = chance.choice(ODD)
    return json.dumps(document).encode()


def mutate_bytes(chance: random.Random, objects: Objects, key: str) -> bytes:
    """Flip a bit, truncate, extend, swap objects, or set an integer of a header or an index to an extreme."""
    data = bytearray(objects[key])
    kind, place = chance.randrange(6), chance.randrange(max(1, len(data)))
    if kind == 0 and data:
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data += chance.randbytes(chance.randrange(1, 64))
    elif kind == 3:
        return objects[chance.choice(sorted(objects))]
    else:
        width = chance.choice([1, 2, 4, 8])
        start = chance.choice([place, 4, 8, 12, len(data) - 20, len(data) - 12, len(data) - 4])
        value = chance.choice([0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), len(data), chance.randrange(256)])
        data[max(0, start) : max(0, start) + width] = value.to_bytes(8, "little")[:width]
    return bytes(data)


def hostile_numbers(chance: random.Random, good: Objects, objects: Objects) -> None:
    """Write other numbers into one array of a shard through the codecs, so that the object itself is sound."""
    store = store_of({key: good[key] for key in good if key.endswith("zarr.json")} | objects)
    spec = chance.choice(SPECS)
    array = zarr.open_array(store, path=spec.name)
    index, limits = chance.randrange(2), np.iinfo(spec.dtype)
    assert array.shards is not None
    rows = slice(index * array.shards[0], (index + 1) * array.shards[0])
    values = np.asarray(array[rows])
    numbers = np.random.default_rng(chance.randrange(2**32))
    wild = numbers.choice([0, 1, 2, 3, LABEL.vocab_size, limits.max, limits.max - 1, limits.min], values.shape)
    values = np.where(numbers.random(values.shape) < chance.choice([0.05, 0.5, 1.0]), wild, values).astype(spec.dtype)
    with zarr.config.set({"array.write_empty_chunks": True}):
        array[rows] = values
    key = shard_keys([spec], index)[0]
    objects[key] = store._store_dict[key].to_bytes()


@given(st.integers(0, 2**64))
@settings(max_examples=METADATA_CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_metadata_mutated_at_random_is_answered_or_refused(good: Objects, seed: int) -> None:
    chance = random.Random(seed)
    objects = dict(good)
    documents = sorted(key for key in good if key.endswith("zarr.json"))
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice([*documents, *["zarr.json"] * len(documents)])
        try:
            objects[key] = mutate_json(chance, objects[key])
        except (ValueError, RecursionError, IndexError):  # an earlier mutation left no JSON
            continue
    if chance.random() < 0.5:
        sign(objects)
    must_answer(store_of(objects))


@given(st.integers(0, 2**64))
@settings(max_examples=OBJECT_CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_objects_mutated_at_random_and_signed_again_are_answered_or_refused(good: Objects, seed: int) -> None:
    chance = random.Random(seed)
    objects = dict(good)
    data_keys = sorted(key for key in good if not key.endswith("zarr.json"))
    for _ in range(chance.choice([1, 1, 3])):
        key = chance.choice(data_keys)
        objects[key] = mutate_bytes(chance, objects, key)
    if chance.random() < 0.85:
        sign(objects)
    must_answer(store_of(objects), chance)


def mutate_zip(chance: random.Random, data: bytes) -> bytes:
    """Set bytes, mostly of the directory at the end, which locates the objects; truncate or extend the file."""
    changed, directory = bytearray(data), int.from_bytes(data[-6:-2], "little")
    for _ in range(chance.choice([1, 1, 2, 4])):
        kind, place = chance.randrange(8), chance.randrange(directory if chance.random() < 0.7 else 0, len(data))
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed += chance.randbytes(chance.randrange(1, 64))
        else:
            width = chance.choice([1, 2, 4, 8])
            value = chance.choice(
                [0, 1, 8, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), len(data), chance.randrange(256)]
            )
            changed[place : place + width] = value.to_bytes(8, "little")[:width]
    return bytes(changed)


@given(st.integers(0, 2**64))
@settings(max_examples=ZIP_CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_zips_mutated_at_random_are_answered_or_refused(good_zip: bytes, seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "c.zip")
        place.write_bytes(mutate_zip(chance, good_zip))
        must_answer(place, chance)


@given(st.integers(0, 2**64))
@settings(max_examples=NUMBER_CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_wild_numbers_in_sound_objects_are_answered_or_refused(good: Objects, seed: int) -> None:
    chance = random.Random(seed)
    objects = dict(good)
    hostile_numbers(chance, good, objects)
    sign(objects)
    for index in range(2):
        try:
            with bounded():
                shard = CacheReader(store_of(objects)).shard(index)
        except LogitcaskError:
            continue
        targets = shard.targets
        assert max(shard.input_ids.max(), targets.head_ids.max(), targets.tail_ids.max()) < LABEL.vocab_size
        assert np.isfinite(targets.log_partition).all()
        assert np.isfinite(targets.tail_logprobs).all()


def on_disk(objects: Objects, folder: Path) -> Path:
    for key, data in objects.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    return folder


def test_a_link_out_of_the_folder_is_neither_read_nor_deleted_through(good: Objects, tmp_path: Path) -> None:
    secret = on_disk({"0": b"secret"}, tmp_path / "outside") / "0"
    for number, link in enumerate(("gold_logprobs/c/1", "gold_logprobs/c")):
        cache = on_disk(good, tmp_path / f"cache{number}")
        moved_to = cache.parent / f"moved{number}"
        (cache / link).rename(moved_to)
        (cache / link).symlink_to(moved_to if number == 0 else secret.parent)
        with pytest.raises(LogitcaskError, match="not a plain file inside the cache"):
            CacheReader(cache).shard(1 - number)
        verification = verify(cache)
        assert any("not a plain file" in problem for problem in verification.problems)
        if number:
            with pytest.raises(LogitcaskError, match="not a plain file"):
                repair(cache, verification)
    assert secret.read_bytes() == b"secret"
    moved = tmp_path / "link"
    moved.symlink_to(on_disk(good, tmp_path / "good"))
    assert len(CacheReader(moved).shard(0)) == 2  # the cache folder itself may be a link
    assert describe(moved).manifest.label == LABEL


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "", "a\x00b", "a\nb", "x" * 200])
def test_a_tokenizer_file_is_a_plain_name(good: Objects, name: str) -> None:
    group = json.loads(good["zarr.json"])
    group["attributes"]["logitcask"]["tokenizer"]["files"] = {name: "0" * 64}
    with pytest.raises(LogitcaskError, match=r"damaged manifest: tokenizer\.files"):
        CacheReader(store_of({**good, "zarr.json": json.dumps(group).encode()}))


READ_WITHIN_1_GIB = """
import resource, sys
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
import logitcask.cache.verify
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), now + (1 << 30)))
try:
    CacheReader(sys.argv[1]).shard(0)
except LogitcaskError as error:
    print(error)
"""


@pytest.mark.parametrize("where", ["blosc", "zstd", "plan"])
def test_a_declared_size_of_gigabytes_is_refused_before_allocation(good: Objects, where: str, tmp_path: Path) -> None:
    objects = dict(good)
    if where == "blosc":
        data = bytearray(objects["input_ids/c/0"])
        data[4:8] = (2**32 - 2**20).to_bytes(4, "little")
        objects["input_ids/c/0"] = bytes(data)
    elif where == "zstd":
        frame = b"\x28\xb5\x2f\xfd\xe0" + (2**32).to_bytes(8, "little")
        objects["shard_examples/c/0"] = frame + bytes(10 << 20)
    else:
        group = json.loads(objects["zarr.json"])
        group["attributes"]["logitcask"]["shards"]["positions"] = 2**31
        objects["zarr.json"] = json.dumps(group).encode()
    sign(objects)
    place = on_disk(objects, tmp_path / "c")
    ran = subprocess.run([sys.executable, "-c", READ_WITHIN_1_GIB, place], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    message = {"blosc": "declares another size", "zstd": "declares another size", "plan": "shards.positions"}[where]
    assert message in ran.stdout
