"""A kill or a power cut at any step of making or replacing a cache: the same command finishes it."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import CacheFormatError, CacheMismatchError, LogitcaskError
from logitcask.cache.labels import Shard
from logitcask.cache.manifest import LabelSettings, Manifest, sha256
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.cache.writer import create_cache
from tests.cache.test_cache import FILES, label_settings, manifest_of
from tests.support.power_cut import KINDS, Cut, Disk
from tests.support.tiny import folder_bytes, sound_shards

NEW, OLD = label_settings(300, 2, 0, 1), label_settings(300, 2, 3, 1)


def shards_of(label: LabelSettings) -> list[Shard]:
    return sound_shards(label, [2])


def make(
    place: Path, label: LabelSettings, *, overwrite: bool = False, files: dict[str, bytes] = FILES, teacher: str = "t"
) -> Path:
    """What stage 1 does with a cache of these labels."""
    shards = shards_of(label)
    manifest, examples = manifest_of(label, shards)
    named = manifest.teacher.model_copy(update={"id": teacher})
    tokenizer = manifest.tokenizer.model_copy(update={"files": {name: sha256(data) for name, data in files.items()}})
    manifest = manifest.model_copy(update={"teacher": named, "tokenizer": tokenizer})
    writer = create_cache(place, manifest, examples, files, overwrite=overwrite)
    for index in writer.missing_shards():
        writer.write_shard(index, shards[index])
    return place


def steps_of(disk: Disk, patch: pytest.MonkeyPatch, label: LabelSettings, *, overwrite: bool) -> int:
    with disk.cut_after(10**9, patch):
        make(disk.root / "cache", label, overwrite=overwrite)
    return disk.steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_cut_off_at_any_step_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "whole").mkdir()
    steps = steps_of(Disk(tmp_path / "whole"), monkeypatch, NEW, overwrite=False)
    wanted = folder_bytes(tmp_path / "whole/cache")
    assert steps > 100
    for step in [*range(0, 12), *range(12, steps, 19)]:
        place = tmp_path / f"cut{step}"
        place.mkdir()
        disk = Disk(place)
        with pytest.raises(Cut), disk.cut_after(step, monkeypatch):
            make(place / "cache", NEW)
        left = disk.left(kind, tmp_path / f"left{step}") / "cache"
        assert folder_bytes(make(left, NEW)) == wanted, f"step {step}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_cut_off_at_any_step_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What is left reads as the old cache, the new one or none; what the user keeps there survives."""
    whole = make(tmp_path / "old", OLD)
    old, wanted = folder_bytes(whole), folder_bytes(make(tmp_path / "new", NEW))
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole/cache", OLD)
    steps = steps_of(Disk(tmp_path / "whole"), monkeypatch, NEW, overwrite=True)
    for step in range(0, steps, 17):
        place = tmp_path / f"cut{step}"
        place.mkdir()
        make(place / "cache", OLD)
        (place / "cache/head_ids/notes.txt").write_text("mine")
        disk = Disk(place)
        with pytest.raises(Cut), disk.cut_after(step, monkeypatch):
            make(place / "cache", NEW, overwrite=True)
        left = disk.left(kind, tmp_path / f"left{step}") / "cache"
        try:
            label = CacheReader(left).manifest.label
            CacheReader(left).shard(0)
        except LogitcaskError:
            pass
        else:
            have = {key: data for key, data in folder_bytes(left).items() if not key.endswith("notes.txt")}
            assert have == (old if label == OLD else wanted), f"step {step}"
        assert make(left, NEW, overwrite=True)
        files = folder_bytes(left)
        assert files.pop("head_ids/notes.txt") == b"mine"
        assert files == wanted, f"step {step}"


def test_a_flush_comes_before_what_relies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifest, constants, seal, shard, commit record: each is durable before the next is written."""
    order: list[str] = []
    (tmp_path / "there").mkdir()
    disk = Disk(tmp_path / "there")
    flushed = disk._flushed

    def record(place: Path) -> None:
        order.append(str(place))
        flushed(place)

    monkeypatch.setattr(disk, "_flushed", record)
    with disk.cut_after(10**9, monkeypatch):
        make(tmp_path / "there/cache", NEW)
    names = [name.removeprefix(f"{tmp_path}/there/cache/") for name in order]
    places = [names.index(key) for key in ("zarr.json", "commits/zarr.json", "seal/c/0/0", "head_ids/c/0/0")]
    assert places == sorted(places)
    assert names.index("commits/c/0/0") > names.index("gold_logprobs/c/0") > names.index("seal/c/0/0")
    files = set(folder_bytes(tmp_path / "there/cache"))
    assert files <= set(names), "every file is flushed"
    folders = {str(p.relative_to(tmp_path)) for p in (tmp_path / "there").rglob("*") if p.is_dir()}
    assert {name.removeprefix(f"{tmp_path}/") for name in order} >= folders, "and every folder"


@pytest.mark.parametrize("torn", [b"", b"{", b"\0" * 300])
@pytest.mark.parametrize("lost", ["zarr.json", "head_ids/zarr.json", "commits/zarr.json", "shard_examples/c/0",
                                  "tokenizer/zarr.json", "tokenizer/tokenizer.json/c/0", "seal/zarr.json",
                                  "seal/c/0/0"])  # fmt: skip
def test_a_lost_constant_beside_committed_shards_is_written_again(tmp_path: Path, lost: str, torn: bytes) -> None:
    cache = make(tmp_path / "cache", NEW)
    wanted = folder_bytes(cache)
    (cache / lost).write_bytes(torn)
    with contextlib.suppress(CacheFormatError):  # of a manifest
        assert verify(cache).problems
        assert lost != "zarr.json"
    assert folder_bytes(make(cache, NEW)) == wanted


@pytest.mark.parametrize("lost", ["zarr.json", "tokenizer/tokenizer.json/c/0"])
def test_a_lost_constant_of_another_machine_is_reported(tmp_path: Path, lost: str) -> None:
    """This run's manifest or tokenizer files have other bytes, so it cannot know what was there."""
    cache = make(tmp_path / "cache", NEW)
    (cache / lost).write_bytes(b"")
    before = folder_bytes(cache)
    with pytest.raises(CacheFormatError, match=rf"{lost} is missing or damaged.*pass --overwrite"):
        make(cache, NEW, files={**FILES, "tokenizer.json": b"{} "}, teacher="elsewhere")
    assert folder_bytes(cache) == before
    make(cache, NEW, overwrite=True)


def test_a_cache_is_resumed_with_its_own_manifest_and_files(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", NEW)
    wanted = folder_bytes(cache)
    (cache / "commits/c/0/0").unlink()
    assert folder_bytes(make(cache, NEW, files={**FILES, "tokenizer.json": b"{} "}, teacher="elsewhere")) == wanted


@pytest.mark.parametrize(
    "content",
    [
        {"zarr.json": b"", "notes.txt": b"x"},
        {"zarr.json": b'{"zarr_format": 3}'},
        {"tokenizer/tokenizer.json": b"{}"},
        {"zarr.json": b"", "a/zarr.json": b"{}"},
    ],
)
def test_a_users_files_are_never_taken_for_the_rest_of_a_cache(tmp_path: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    for overwrite in (False, True):
        with pytest.raises(CacheFormatError, match="not a logit cache"):
            make(tmp_path / "out", NEW, overwrite=overwrite)
    assert folder_bytes(tmp_path / "out") == content


def test_a_torn_manifest_of_another_cache_does_not_cost_its_shards(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", OLD)
    (cache / "zarr.json").write_bytes(b"")
    before = folder_bytes(cache)
    with pytest.raises(CacheFormatError, match=r"zarr\.json is missing or damaged"):
        make(cache, NEW)
    assert folder_bytes(cache) == before


def test_a_zip_is_durable_before_its_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "cache", NEW)
    disk, removed = Disk(tmp_path), list[bool]()
    rmtree = shutil.rmtree

    def spy(folder: Path, **options: Any) -> None:
        if Path(folder).name == ".c.zip.parts":
            removed.append("c.zip" in disk._names[str(tmp_path)])
        rmtree(folder, **options)

    with disk.cut_after(10**9, monkeypatch):
        monkeypatch.setattr(shutil, "rmtree", spy)
        copy_cache(str(tmp_path / "cache"), str(tmp_path / "c.zip"), None)
    assert removed == [True]


def test_a_copy_with_a_torn_manifest_is_finished(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", NEW)
    copy_cache(str(cache), str(tmp_path / "copy"), None)
    (tmp_path / "copy/zarr.json").write_bytes(b"")
    copy_cache(str(cache), str(tmp_path / "copy"), None)
    assert folder_bytes(tmp_path / "copy") == folder_bytes(cache)


def test_other_labels_are_refused_with_the_difference(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", OLD)
    with pytest.raises(CacheMismatchError, match=r"label\.tail_draws: cache has 3, this run has 0"):
        make(cache, NEW)
    manifest: Manifest = CacheReader(cache).manifest
    assert manifest.label == OLD
    np.testing.assert_array_equal(CacheReader(cache).shard(0).input_ids, shards_of(OLD)[0].input_ids)
