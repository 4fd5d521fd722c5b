"""Folders and .zip files of any name, by relative and absolute paths, and what may already lie in them."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import logitcask as lc
from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.open import SYSTEM_NAMES, list_objects, object_sizes, open_store
from logitcask.pipeline.cli import main
from logitcask.pipeline.mistakes import error_lines
from logitcask.pipeline.precompute.precompute import precompute
from tests.support.tiny import folder_bytes, make_cache, precompute_settings

NAMES = ["logprobs", "mask", "c", "commits", "zarr.json", "seal", "a b", ".hidden", "x..y.2", "é ✓", "c/c", "#?%20"]
SHAPES = [*((name, "{}") for name in NAMES), ("c", "./{}/"), ("mask", "{here}/{}"), ("commits", "{here}/{}/")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("places"), shard_positions=32)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Return the exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["logitcask", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_cache_may_have_any_name(
    cache: Path,
    name: str,
    shape: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command of ``cache`` finds all of it, and names it as the user did."""
    monkeypatch.chdir(tmp_path)
    place = shape.format(name, here=tmp_path)
    assert run(monkeypatch, "cache", "copy", cache, place) == 0
    assert folder_bytes(tmp_path / name) == folder_bytes(cache)
    store = open_store(place, read_only=True)
    assert object_sizes(store) == {key: len(data) for key, data in folder_bytes(cache).items()}
    assert list_objects(store, "commits/c/") == {key for key in folder_bytes(cache) if key.startswith("commits/c/")}
    capsys.readouterr()
    assert run(monkeypatch, "cache", "info", place) == run(monkeypatch, "cache", "verify", place) == 0
    out, _ = capsys.readouterr()
    assert f"cache       {place}, format" in out
    assert f"{place}: all" in out
    assert run(monkeypatch, "cache", "copy", place, "copy.zip") == 0
    assert run(monkeypatch, "cache", "copy", "copy.zip", "back") == 0
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)


def test_a_folder_at_the_root_may_be_named_like_an_array(cache: Path) -> None:
    """As a volume ``/c`` in a container: ``/c/commits/c/0/0`` holds ``/c/`` twice."""
    place = Path("/c")
    if place.exists():
        pytest.skip("/c is taken")
    try:
        shutil.copytree(cache, place)
    except PermissionError:
        pytest.skip("the root folder cannot be written")
    try:
        assert object_sizes(open_store(place, read_only=True)) == {k: len(v) for k, v in folder_bytes(cache).items()}
    finally:
        shutil.rmtree(place)


def test_a_cache_stays_open_when_the_working_directory_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.parent)
    store = open_store(cache.name, read_only=True)
    monkeypatch.chdir(tmp_path)
    assert set(object_sizes(store)) == set(folder_bytes(cache))


def test_what_systems_put_into_a_folder_is_not_in_the_way(tmp_path: Path) -> None:
    """It is neither part of the cache nor removed, even by --overwrite."""
    want = make_cache(tmp_path, output=tmp_path / "want")
    names = {*SYSTEM_NAMES, ".Trash-1000", "._x"}
    for name in names:
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "file").write_text("system's")
    for overwrite in (False, True):
        precompute(precompute_settings(tmp_path, overwrite=overwrite))
        assert set(object_sizes(open_store(tmp_path / "cache", read_only=True))) == set(folder_bytes(want))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {*names, *(path.name for path in want.iterdir())}
    assert all((tmp_path / "cache" / name / "file").read_text() == "system's" for name in names)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_anything_else_is_refused_by_name(tmp_path: Path, overwrite: bool) -> None:
    make_cache(tmp_path, output=tmp_path / "want")
    (tmp_path / "cache").mkdir()
    for name in ("thesis.tex", ".DS_Store", "b\n", "c", "d"):
        (tmp_path / "cache" / name).write_text("mine")
    named = r"; it holds 'b\\n', 'c', 'd' and 1 more: give a cache's own folder$"
    with pytest.raises(LogitcaskError, match=named):
        precompute(precompute_settings(tmp_path, overwrite=overwrite))
    assert len(list((tmp_path / "cache").iterdir())) == 5


def pack(cache: Path, place: Path, top: str, **others: str) -> Path:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in folder_bytes(cache).items():
            archive.writestr(f"{top}{key}", data)
        for name, text in others.items():
            archive.writestr(name, text)
    return place


@pytest.mark.parametrize(("top", "suffix"), [("", ".zip"), ("cache/", ".zip"), ("c/", ".ZIP"), ("a b/", ".Zip")])
def test_a_zip_that_a_desktop_packed_is_read(
    cache: Path, top: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a folder on top, its own entry, and what macOS adds."""
    others = {"__MACOSX/._x": "", ".DS_Store": "", **({top: ""} if top else {})}
    place = pack(cache, tmp_path / f"x{suffix}", top, **others)
    assert run(monkeypatch, "cache", "verify", place) == run(monkeypatch, "cache", "info", place) == 0
    assert run(monkeypatch, "cache", "copy", place, tmp_path / "back") == 0
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)


def test_a_zip_is_written_with_a_suffix_in_capitals(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "cache", "copy", cache, tmp_path / "x.ZIP") == 0
    assert zipfile.is_zipfile(tmp_path / "x.ZIP")
    assert run(monkeypatch, "cache", "verify", tmp_path / "x.ZIP") == 0


def test_a_zip_with_two_folders_names_them(cache: Path, tmp_path: Path) -> None:
    place = pack(cache, tmp_path / "x.zip", "one/", **{"two/zarr.json": "{}"})
    with pytest.raises(LogitcaskError, match=r"; it holds 'one', 'two': give a cache's own folder$"):
        CacheReader(place)


def test_a_second_repair_says_that_nothing_is_damaged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache/tail_ids/c/1/0").write_bytes(b"x")
    texts = []
    for _ in range(2):
        assert run(monkeypatch, "cache", "verify", tmp_path / "cache", "--repair") == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0].startswith("dropped shards [1]: run the same")
    rest = "no shard is damaged: run the command that made the cache again to finish it"
    assert texts[1] == f"nothing to repair: {rest}"
    assert run(monkeypatch, "cache", "verify", tmp_path / "cache") == 2
    assert capsys.readouterr().err == error_lines(f"{tmp_path}/cache: 1 problems: {rest}", "")


@pytest.mark.parametrize("place", ["s3:/bucket/x", "hf:/datasets/a/b", "https:/host/x"])
def test_a_url_with_one_slash_is_no_folder(
    cache: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scheme, rest = place.split(":/")
    stage_1 = ["precompute-logits", "--teacher-model", "t", "--train-data", "d", "--output", place]
    for words in (["cache", "copy", cache, place], ["cache", "info", place], stage_1):
        assert run(monkeypatch, *words) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "a URL has two slashes after its scheme" in shown
        assert f"write {scheme}://{rest}, as text" in shown
    with pytest.raises(LogitcaskError, match="a URL has two slashes"):
        lc.open(Path(f"{scheme}://{rest}"))
    assert not list(tmp_path.iterdir())


def test_a_cache_is_not_written_into_another(cache: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(cache, whole)
    before = folder_bytes(whole)
    for inside in (whole / "other", whole / "commits/c"):
        with pytest.raises(LogitcaskError, match=r"is inside the cache .*: choose a folder outside of it"):
            copy_cache(str(cache), str(inside), None)
    with pytest.raises(LogitcaskError, match="is inside the cache"):
        make_cache(tmp_path, output=whole / "other")
    assert folder_bytes(whole) == before
