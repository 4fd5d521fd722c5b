"""Untrusted caches of exact labels: as ``test_hostile``, with what only they hold."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.exact.code import LEVELS, pack, unpack
from logitcask.cache.exact.head import TeacherHead, decode
from logitcask.cache.integrity import commit_key, constant_objects, shard_keys
from logitcask.cache.labels import ExactTargets, FloatArray, Shard
from logitcask.cache.layout import shard_specs
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.cache.writer import _constants, create_cache
from tests.cache.test_cache import FILES, manifest_of
from tests.cache.test_hostile import Objects, bounded, mutate_bytes, mutate_json, on_disk, store_of
from tests.support.exact import LABEL, ON_A_TRELLIS, exact_manifest, exact_shards, random_head, write_exact
from tests.support.tiny import folder_bytes, sound_shards

SHARDS, TRELLIS_SHARDS = exact_shards([2, 1]), exact_shards([2, 1], ON_A_TRELLIS)
SPARSE = LABEL.model_copy(update={"exact": None})
PLAIN, EXAMPLES = manifest_of(SPARSE, sound_shards(SPARSE, [2, 1]))
MANIFEST = exact_manifest(PLAIN)
SPECS = shard_specs(MANIFEST)


@pytest.fixture(scope="module")
def trellis(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    folder = tmp_path_factory.mktemp("trellis") / "c"
    write_exact(folder, exact_manifest(PLAIN, ON_A_TRELLIS), EXAMPLES, FILES, TRELLIS_SHARDS)
    assert verify(folder).problems == []
    return folder_bytes(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    folder = tmp_path_factory.mktemp("hostile") / "c"
    write_exact(folder, MANIFEST, EXAMPLES, FILES, SHARDS)
    assert verify(folder).problems == []
    return folder_bytes(folder)


def sign(objects: Objects) -> None:
    """Recompute every digest but the head's in the manifest."""
    for index in range(2):
        objects[commit_key(index)] = b"".join(_digest(objects, key) for key in shard_keys(SPECS, index))
    objects["seal/c/0/0"] = b"".join(_digest(objects, key) for key in constant_objects(MANIFEST))


def _digest(objects: Objects, key: str) -> bytes:
    import hashlib

    return hashlib.sha256(objects.get(key, b"")).digest()


def answers(objects: Objects) -> list[str]:
    """Make every call; return the messages of those that were refused, one line each."""
    place, messages = store_of(objects), []
    for call in (
        lambda: CacheReader(place, partial=True).example(2),
        lambda: CacheReader(place, partial=True).teacher_head(),
        lambda: verify(place),
    ):
        try:
            with bounded():
                call()
        except LogitcaskError as error:
            messages.append(str(error))
    assert all("\n" not in message and len(message) <= 1000 for message in messages)
    return messages


def read_all(objects: Objects) -> None:
    reader = CacheReader(store_of(objects))
    reader.teacher_head()
    for index in range(2):
        reader.shard(index)


@pytest.mark.parametrize(("objects", "shards"), [("good", SHARDS), ("trellis", TRELLIS_SHARDS)])
def test_codes_and_head_come_back(objects: str, shards: list[Shard], request: pytest.FixtureRequest) -> None:
    reader, head = CacheReader(store_of(request.getfixturevalue(objects))), random_head()
    for index, shard in enumerate(shards):
        read = reader.shard(index).targets
        assert isinstance(read, ExactTargets)
        assert isinstance(shard.targets, ExactTargets)
        np.testing.assert_array_equal(read.codes, shard.targets.codes)
        np.testing.assert_allclose(read.steps, shard.targets.steps, rtol=1e-6)
        np.testing.assert_array_equal(read.tail_bias, shard.targets.tail_bias)
    stored = reader.teacher_head()
    for name, array in head.arrays().items():
        np.testing.assert_array_equal(stored.arrays()[name], array)
    assert (stored.scale, stored.softcap) == (0.5, 30.0)


@pytest.mark.parametrize(
    "name", ["hidden_codes/c/1/0", "hidden_quotients/c/0/0", "head/weight/c/0/0", "head/centre/c/0"]
)
@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_damage_is_found_and_refused_in_one_line(good: Objects, name: str, damage: str) -> None:
    objects, data = dict(good), bytearray(good[name])
    data[len(data) // 2] ^= 4
    objects[name] = bytes(data) if damage == "flipped" else good[name][:-3]
    if damage == "missing":
        del objects[name]
    assert any(name in problem or "head" in problem for problem in verify(store_of(objects)).problems)
    with pytest.raises(LogitcaskError, match=name.split("/", maxsplit=1)[0]):
        read_all(objects)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"step": 0.0}, "greater than 0"),
        ({"step": 1e9}, "less than or equal"),
        ({"columns": [1, 2, 3]}, "at least 4"),
        ({"columns": [0, 0, 0, 0]}, "1 to 12 coefficients"),
        ({"columns": [10, 2, 1, 4]}, "1 to 12 coefficients"),
        ({"width": 2**40}, "less than or equal"),
        ({"trellis": 8}, "Input should be 4"),
        ({"tail_bias": [[0.0]] * 5}, "one tail_bias per temperature"),
        ({"tail_bias": [[0.0, 0.0]] * 4}, "at least 5"),
        ({"tail_bias": [[0.0, 1e3]] * 5}, "less than or equal"),
    ],
)
def test_an_impossible_code_is_refused(good: Objects, change: dict[str, Any], rule: str) -> None:
    group = json.loads(good["zarr.json"])
    group["attributes"]["logitcask"]["label"]["exact"].update(change)
    with pytest.raises(LogitcaskError, match=f"damaged manifest: .*{rule}"):
        CacheReader(store_of({**good, "zarr.json": json.dumps(group).encode()}))


def test_a_head_that_does_not_fit_in_memory_is_refused(good: Objects) -> None:
    group = json.loads(good["zarr.json"])
    group["attributes"]["logitcask"]["label"]["vocab_size"] = 2**31
    with pytest.raises(LogitcaskError, match="a teacher's head must have at most"):
        CacheReader(store_of({**good, "zarr.json": json.dumps(group).encode()}))


def test_a_lost_head_is_not_replaced_by_one_of_another_basis(good: Objects, tmp_path: Path) -> None:
    folder, head = on_disk(good, tmp_path / "c"), random_head()
    (folder / "head/basis/c/0/0").unlink()
    other = replace(head, basis=head.basis[:-1], forward=head.forward[:, :-1])
    wanted = MANIFEST.model_copy(update={"teacher_head": other.identity})
    with pytest.raises(LogitcaskError, match="is missing or damaged, and this run would write another one"):
        create_cache(folder, wanted, EXAMPLES, FILES, head=other)
    create_cache(folder, MANIFEST, EXAMPLES, FILES, head=head)
    assert folder_bytes(folder) == good


def test_nothing_is_left_of_an_overwritten_head(good: Objects, tmp_path: Path) -> None:
    create_cache(on_disk(good, tmp_path / "c"), PLAIN, EXAMPLES, FILES, overwrite=True)
    create_cache(tmp_path / "new", PLAIN, EXAMPLES, FILES)
    assert folder_bytes(tmp_path / "c") == folder_bytes(tmp_path / "new")


def test_a_code_beyond_all_ranges_is_cut() -> None:
    codes = np.array([[2**14, -(2**14), 2**14, -(2**14)]], np.int16)
    for count in range(4):
        columns = [0] * count + [4] + [0] * (3 - count)
        read = unpack(*pack(codes, columns), columns)
        assert (np.sign(read) == np.sign(codes)).all()
        assert (np.abs(read) >= np.minimum(np.abs(codes), 126 * LEVELS[count])).all()


@pytest.mark.parametrize(
    ("name", "value"), [("centre", np.nan), ("basis", np.inf), ("weight", 0x7F80), ("bias", -np.inf)]
)
def test_a_head_that_would_spoil_a_loss_is_refused(good: Objects, name: str, value: float) -> None:
    changed: dict[str, Any] = {name: random_head().arrays()[name].copy()}
    changed[name].flat[1] = value
    head: TeacherHead = replace(random_head(), **changed)
    manifest = MANIFEST.model_copy(update={"teacher_head": head.identity})
    objects = {**good, **_constants(manifest, EXAMPLES, FILES, head)}
    with pytest.raises(LogitcaskError, match=f"head/{name}: must be finite"):
        CacheReader(store_of(objects)).teacher_head()
    assert any("must be finite" in problem for problem in verify(store_of(objects)).problems)


@given(st.integers(0, 2**64))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_what_is_mutated_at_random_is_answered_or_refused(good: Objects, seed: int) -> None:
    chance, objects = random.Random(seed), dict(good)
    new = [key for key in sorted(good) if key.startswith(("head/", "hidden_"))]
    key = chance.choice([*new, "zarr.json", "zarr.json"])
    try:
        objects[key] = (
            mutate_json(chance, objects[key]) if key.endswith(".json") else mutate_bytes(chance, objects, key)
        )
    except (ValueError, RecursionError, IndexError):
        return
    if chance.random() < 0.7:
        sign(objects)
    answers(objects)


def test_any_codes_decode_to_finite_numbers(good: Objects) -> None:
    store, random_numbers = store_of(good), np.random.default_rng(0)
    objects = dict(good)
    for spec in SPECS:
        if spec.name.startswith("hidden_"):
            array = zarr.open_array(store, path=spec.name)
            assert array.shards is not None
            limits = np.iinfo(spec.dtype)
            wild = random_numbers.integers(limits.min, limits.max + 1, array.shards).astype(spec.dtype)
            with zarr.config.set({"array.write_empty_chunks": True}):
                array[: array.shards[0]] = wild
            objects[shard_keys([spec], 0)[0]] = store._store_dict[shard_keys([spec], 0)[0]].to_bytes()
    sign(objects)
    reader = CacheReader(store_of(objects))
    targets = reader.shard(0).targets
    assert isinstance(targets, ExactTargets)
    assert np.isfinite(targets.codes * targets.steps[:, None] @ reader.teacher_head().basis).all()
    assert verify(store_of(objects)).shards == 2


@pytest.mark.parametrize("objects", ["good", "trellis"])
def test_what_the_page_of_the_format_says_decodes_them(objects: str, request: pytest.FixtureRequest) -> None:
    """A second implementation, from docs/reference/cache-format.md alone."""
    store = store_of(request.getfixturevalue(objects))
    group: Any = zarr.open_group(store, mode="r")
    reader, head = CacheReader(store), group["head"]
    targets, stored = reader.shard(0).targets, reader.teacher_head()
    assert isinstance(targets, ExactTargets)
    assert targets.steps.max() > 10 * targets.steps.min(), "tails of little mass and of much"
    weight = (head["weight"][:].astype(np.uint32) << 16).view(np.float32)
    for row in range(len(targets)):
        hidden, bias = _decoded(group, row)
        np.testing.assert_allclose(targets.tail_bias[row], bias, rtol=1e-6)
        raw = 0.5 * (hidden @ weight.T + head["bias"][:])
        ours = decode(targets[row : row + 1], stored)
        np.testing.assert_allclose(ours[0], hidden, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stored.logits(ours)[0], 30 * np.tanh(raw / 30), rtol=1e-3, atol=1e-3)


def _decoded(group: Any, row: int) -> tuple[FloatArray, list[float]]:
    exact = group.attrs["logitcask"]["label"]["exact"]
    packed, quotients, place = group["hidden_codes"][row], group["hidden_quotients"][row], 0
    codes: list[int] = []
    for count, levels, per_byte in zip(exact["columns"], (255, 15, 6, 3), (1, 2, 3, 5), strict=True):
        for start in range(0, count, per_byte):
            value, digits = int(packed[place]), list[int]()
            for _ in range(min(per_byte, count - start)):
                digits.insert(0, value % levels)
                value //= levels
            codes += [
                digit - (levels - 1) // 2 + levels * int(quotients[len(codes) + i]) for i, digit in enumerate(digits)
            ]
            place += 1
    if "trellis" in exact:
        codes = [2 * code - int(np.sign(code)) * _ruler(codes, i) for i, code in enumerate(codes)]
    odds = np.cumsum(group["log_tail_odds"][row], dtype=np.int16) / 64
    step = exact["step"] / np.sqrt(max((1 / (1 + np.exp(-odds))).mean(), 2.0**-12))
    hidden: FloatArray = step * np.array(codes) @ group["head/basis"][:] + group["head/centre"][:]
    kind = min(4, math.floor(2 * math.log2(step / exact["step"]) + 1e-3))
    return hidden, exact["tail_bias"][kind] if "tail_bias" in exact else [0.0, 0.0]


def _ruler(codes: list[int], i: int) -> int:
    return sum(codes[j] for j in range(i - 1, i - i % 64 - 1, -2)) % 2
