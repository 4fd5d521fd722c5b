"""The store reads back what was written, up to the declared quantisation, once it is committed."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.cache.errors import CacheFormatError, IncompleteCacheError
from logitcask.cache.labels import Example, Shard, SparseTargets
from logitcask.cache.layout import (
    GOLD_SCALE,
    HEAD_SCALE,
    ODDS_SCALE,
    TAIL_STEPS,
    TAIL_UNIT,
    array_specs,
    encode_targets,
    id_dtype,
    shard_specs,
)
from logitcask.cache.manifest import (
    EXACT_VERSION,
    FORMAT_VERSION,
    DataIdentity,
    LabelSettings,
    Manifest,
    TeacherIdentity,
    TokenizerIdentity,
    sha256,
)
from logitcask.cache.reader import CacheReader, is_complete
from logitcask.cache.report.info import describe, render
from logitcask.cache.writer import CacheWriter, create_cache
from logitcask.pipeline.precompute.sharding import plan_strides
from tests.support.tiny import RECORDS, make_cache

FILES = {"tokenizer.json": b"{}", "chat_template.jinja": bytes(range(256))}
SCALES = {
    "head_logprobs": HEAD_SCALE,
    "log_partition": HEAD_SCALE + ODDS_SCALE,
    "log_tail_mass": ODDS_SCALE,
    "gold_logprobs": GOLD_SCALE,
}


def label_settings(vocab: int, head: int, draws: int, temperatures: int = 3) -> LabelSettings:
    return LabelSettings(
        vocab_size=vocab,
        head_size=head,
        tail_draws=draws,
        temperatures=[1.0 + i / 2 for i in range(temperatures)],
        seed=0,
    )


def random_targets(random: np.random.Generator, n: int, label: LabelSettings) -> SparseTargets:
    """Return random labels: distinct ids, an ascending tail with padding last, some positions without a tail."""
    vocab, k, m, j = label.vocab_size, label.head_size, label.tail_draws, len(label.temperatures)
    ids = np.stack([random.choice(vocab, k + m, replace=k + m > vocab) for _ in range(n)]).reshape(n, k + m)
    ids[: n // 2] = np.where(ids[: n // 2] < 3, vocab - 1 - ids[: n // 2], ids[: n // 2])  # reach the last ids
    distinct = random.integers(0 if k else 1, m + 1, n) if m else np.zeros(n, dtype=np.int64)
    used = np.arange(m) < distinct[:, None]
    tail = np.sort(np.where(used, ids[:, k:], vocab), axis=1)
    counts = np.where(used, 1, 0)
    if m:
        counts[:, 0] += np.where(distinct > 0, m - distinct, 0)
    mass = -random.exponential(3.0, (n, j)).astype(np.float32)
    mass[distinct == 0] = -np.inf
    gold = -random.exponential(3.0, n).astype(np.float32)
    gold[:1] = -np.inf
    head = -np.sort(random.exponential(4.0, (n, k)), axis=1).astype(np.float32)
    partition = random.normal(0.0, 3.0, (n, j)).astype(np.float32)
    if k:  # head and tail must sum to 1
        log_head = np.log(-np.expm1(mass.astype(np.float64)))
        partition = (np.logaddexp.reduce(head[:, :, None] / np.array(label.temperatures), axis=1) - log_head).astype(
            "f4"
        )
    else:
        mass[:] = 0.0
    head = (head - partition[:, :1]).astype(np.float32)  # log-probabilities at T=1, the first
    partition = (partition - partition[:, :1] / np.array(label.temperatures)).astype(np.float32)
    bottom = head[:, -1:] if k else np.zeros((n, 1), dtype=np.float32)  # no drawn token is above the head
    return SparseTargets(
        head_ids=ids[:, :k],
        head_logprobs=head,
        tail_ids=np.where(used, tail, 0),
        tail_logprobs=np.where(used, bottom - random.exponential(20.0, (n, m)), 0.0).astype(np.float32),
        tail_counts=counts,
        log_partition=partition,
        log_tail_mass=mass,
        gold_logprobs=gold,
    )


def random_shards(label: LabelSettings, sizes: list[int], seed: int = 0) -> list[Shard]:
    random = np.random.default_rng(seed)
    shards = []
    for examples in sizes:
        parts = []
        for _ in range(examples):
            length = int(random.integers(2, 12))
            mask = random.random(length) < 0.5
            mask[0], mask[-1] = True, False
            ids = random.integers(0, label.vocab_size, length)
            parts.append(Example(ids, mask, random_targets(random, int(mask.sum()), label)))
        shards.append(Shard.of(parts))
    return shards


def manifest_of(label: LabelSettings, shards: list[Shard]) -> tuple[Manifest, np.ndarray[Any, Any]]:
    tokens = np.concatenate([s.token_count for s in shards])
    positions = np.concatenate([s.position_count for s in shards])
    shard_examples = np.array([len(s) for s in shards], dtype=np.int64)
    counts: dict[str, Any] = {"examples": len(tokens), "tokens": int(tokens.sum()), "positions": int(positions.sum())}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        teacher=TeacherIdentity(id="t", revision="", weights="0" * 64, dtype="float32", engine="none", versions={}),
        tokenizer=TokenizerIdentity(
            fingerprint="1" * 64, chat_template=None, files={name: sha256(data) for name, data in FILES.items()}
        ),
        data=DataIdentity(
            fingerprint="2" * 64, **counts, truncated=0, dropped=0, max_seq_length=12, longest=12, prompt_loss=False
        ),
        label=label,
        shards=plan_strides(shard_examples, tokens, positions),
    )
    return manifest, shard_examples


def write(path: Path, label: LabelSettings, shards: list[Shard], only: set[int] | None = None) -> CacheWriter:
    manifest, shard_examples = manifest_of(label, shards)
    writer = create_cache(path, manifest, shard_examples, FILES)
    for index in writer.missing_shards():
        if only is None or index in only:
            writer.write_shard(index, shards[index])
    return writer


def assert_equal_targets(read: SparseTargets, want: SparseTargets) -> None:
    assert read.tail_logprobs.shape == want.tail_logprobs.shape
    for field in fields(SparseTargets):
        a, b = getattr(read, field.name), getattr(want, field.name)
        if field.name in SCALES:
            np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg=field.name)
            near = np.isfinite(b)
            np.testing.assert_allclose(a[near], b[near], rtol=0, atol=SCALES[field.name] * 0.501, err_msg=field.name)
        elif field.name == "tail_logprobs":  # coarser further below the head
            last = want.head_logprobs[:, -1:] if want.head_logprobs.shape[1] else np.float32(0.0)
            step = np.expm1(1 / (2 * TAIL_STEPS)) * (TAIL_UNIT + last - b) + HEAD_SCALE
            assert (np.abs(a - b)[want.tail_counts > 0] <= step[want.tail_counts > 0]).all()
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize(
    ("vocab", "head", "draws"),
    [
        (300, 4, 8),
        (65_536, 8, 24),
        (65_537, 2, 3),
        (70_000, 8, 24),
        (152_064, 8, 24),
        (300, 0, 8),
        (300, 8, 0),
        (70_000, 3, 255),
        (70_000, 3, 256),
        (300, 0, 300),
        (2000, 1, 300),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, vocab: int, head: int, draws: int) -> None:
    label = label_settings(vocab, head, draws)
    shards = random_shards(label, [3, 1, 5])
    write(tmp_path / "c", label, shards)
    reader = CacheReader(tmp_path / "c")
    assert len(reader) == 9
    place = iter(range(9))
    for index, shard in enumerate(shards):
        assert all(
            (a >= 0).all()
            for name, a in encode_targets(shard.targets).items()
            if name not in ("log_partition", "log_tail_odds")
        )
        np.testing.assert_array_equal(reader.shard(index).input_ids, shard.input_ids)
        assert_equal_targets(reader.shard(index).targets, shard.targets)
        for inner in range(len(shard)):
            example, want = reader.example(next(place)), shard.example(inner)
            np.testing.assert_array_equal(example.input_ids, want.input_ids)
            np.testing.assert_array_equal(example.target_mask, want.target_mask)
            assert_equal_targets(example.targets, want.targets)
    np.testing.assert_array_equal(
        reader.counts("token_count", range(reader.manifest.shards.count)),
        np.concatenate([s.token_count for s in shards]),
    )
    np.testing.assert_array_equal(
        reader.counts("position_count", range(reader.manifest.shards.count)),
        np.concatenate([s.position_count for s in shards]),
    )
    assert reader.tokenizer_files() == FILES


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    st.sampled_from([2, 300, 65_536, 65_537]),
    st.integers(0, 2),
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_any_shape_is_read_as_written(
    tmp_path_factory: pytest.TempPathFactory,
    vocab: int,
    head: int,
    draws: int,
    temperatures: int,
    sizes: list[int],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "c"
    label = label_settings(vocab, head, draws, temperatures)
    shards = random_shards(label, sizes, seed)
    write(path, label, shards)
    reader = CacheReader(path)
    for index, shard in enumerate(shards):
        assert_equal_targets(reader.shard(index).targets, shard.targets)


def test_dtypes_are_the_smallest_that_hold_the_vocabulary(tmp_path: Path) -> None:
    assert [id_dtype(v) for v in (300, 65_536, 65_537, 152_064)] == ["uint16", "uint16", "uint32", "uint32"]
    write(tmp_path / "c", label := label_settings(70_000, 2, 300), random_shards(label, [2]))
    group = zarr.open_group(tmp_path / "c", mode="r")
    for spec in array_specs(label):
        array = group[spec.name]
        assert isinstance(array, zarr.Array)
        assert (array.dtype, array.ndim) == (np.dtype(spec.dtype), 2 if spec.width else 1), spec.name


def test_uncommitted_shards_are_missing_and_refused(tmp_path: Path) -> None:
    label = label_settings(300, 4, 8)
    shards = random_shards(label, [2, 2, 2, 2])
    writer = write(tmp_path / "c", label, shards, only={0, 2})
    assert writer.missing_shards() == [1, 3]
    assert not is_complete(tmp_path / "c")
    with pytest.raises(IncompleteCacheError, match=r"2 of 4 shards.*logitcask precompute-logits"):
        CacheReader(tmp_path / "c")
    write(tmp_path / "c", label, shards)
    assert is_complete(tmp_path / "c")
    assert_equal_targets(CacheReader(tmp_path / "c").shard(3).targets, shards[3].targets)


def test_a_commit_record_holds_the_digest_of_each_object(tmp_path: Path) -> None:
    label = label_settings(300, 4, 8)
    writer = write(tmp_path / "c", label, random_shards(label, [2, 3]))
    commits = zarr.open_group(tmp_path / "c", mode="r")["commits"]
    assert isinstance(commits, zarr.Array)
    for index in range(2):
        row = np.asarray(commits[index]).tobytes()
        keys = [f"{s.name}/c/{index}" + ("/0" if s.width else "") for s in shard_specs(writer.manifest)]
        assert row.hex() == "".join(sha256((tmp_path / "c" / key).read_bytes()) for key in keys)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    changed = (
        (cache / "zarr.json")
        .read_text()
        .replace(f'"format_version": {FORMAT_VERSION}', f'"format_version": {EXACT_VERSION + 1}, "new_field": 1')
    )
    (cache / "zarr.json").write_text(changed)
    with pytest.raises(CacheFormatError, match=rf"format {EXACT_VERSION + 1} is newer .*upgrade logitcask"):
        CacheReader(cache)


def test_a_moved_cache_reads_the_same(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    first = CacheReader(cache)
    examples = [first.example(i) for i in range(len(first))]
    shutil.move(cache, tmp_path / "else where")
    shutil.rmtree(tmp_path / "teacher")
    moved = CacheReader(tmp_path / "else where")
    assert moved.manifest == first.manifest
    for index, want in enumerate(examples):
        example = moved.example(index)
        np.testing.assert_array_equal(example.input_ids, want.input_ids)
        np.testing.assert_array_equal(example.targets.tail_ids, want.targets.tail_ids)
    assert f"{len(RECORDS)} examples" in render(describe(tmp_path / "else where"))


def test_the_cache_does_not_import_torch() -> None:
    files = [path.with_suffix("") for path in sorted(Path("cache").rglob("*.py")) if path.stem != "__init__"]
    names = [f"logitcask.{'.'.join(file.parts)}" for file in files]
    assert len(names) > 15
    loaded = "{'torch', 'transformers', 'logitcask.pipeline'} & set(sys.modules)"
    code = f"import {', '.join(names)}, sys; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
