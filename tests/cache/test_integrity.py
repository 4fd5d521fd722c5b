"""A cache survives kills, flipped bytes and lost objects: damage is found, reported, and redone."""

import json
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from logitcask.cache.errors import CacheFormatError, LogitcaskError
from logitcask.cache.reader import CacheReader, is_complete
from logitcask.cache.verify import repair, verify
from logitcask.pipeline.cli import main
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from tests.support.forked import forks
from tests.support.mistakes import said
from tests.support.nightly import times
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, precompute_settings, write_jsonl

FLIPS, KILLS = times(300, 1000), times(12, 40)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("integrity"), shard_positions=128)


def test_a_good_cache_has_no_problems(cache: Path) -> None:
    verification = verify(cache)
    assert verification.problems == []
    assert verification.shards > 1


def test_every_flipped_byte_is_found(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    shutil.copytree(cache, place)
    chance = random.Random(0)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    for number in range(FLIPS):
        file = files[number % len(files)] if number < 2 * len(files) else chance.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        file.write_bytes(bad)
        try:
            problems = verify(place).problems
        except CacheFormatError as error:
            problems = [str(error)]
        assert problems, f"flip {number} in {file.relative_to(place)} was not found"
        file.write_bytes(good)
    assert verify(place).problems == []


def test_every_missing_or_cut_object_is_found(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    shutil.copytree(cache, place)
    for file in sorted(file for file in place.rglob("*") if file.is_file()):
        good = file.read_bytes()
        for bad in (None, good[:-1], b""):
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            try:
                problems = verify(place).problems
            except CacheFormatError as error:
                problems = [str(error)]
            assert problems, file.relative_to(place)
            file.write_bytes(good)


def test_a_damaged_shard_is_refused_not_trained_on(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    shutil.copytree(cache, place)
    _flip(place / "tail_ids" / "c" / "1" / "0")
    reader = CacheReader(place)
    reader.shard(0)
    with pytest.raises(CacheFormatError, match=r"shard 1 is damaged: tail_ids/c/1/0: bytes differ"):
        reader.shard(1)


def test_repair_drops_the_damaged_shards_and_stage_1_redoes_them(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shard_positions=128)
    whole = folder_bytes(cache)
    _flip(cache / "head_ids" / "c" / "0" / "0")
    (cache / "gold_logprobs" / "c" / "1").unlink()
    assert repair(cache, verify(cache)) == [0, 1]
    report = precompute(precompute_settings(tmp_path, shard_positions=128))
    assert report.shards_written == 2
    assert folder_bytes(cache) == whole


def test_verify_tells_scripts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "cache"
    shutil.copytree(cache, place)
    whole = {"path": str(place), "shards": verify(cache).shards, "missing": [], "constants": [], "damaged": {}}
    damaged = {**whole, "damaged": {"1": ["tail_ids/c/1/0: bytes differ"]}}
    dropped = {**whole, "missing": [1]}
    for want, more, code in ((whole, [], 0), (damaged, [], 2), (damaged, ["--repair"], 0), (dropped, [], 2)):
        if want is damaged and not more:
            _flip(place / "tail_ids" / "c" / "1" / "0")
        monkeypatch.setattr(sys, "argv", ["logitcask", "cache", "verify", str(place), "--json", *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert int(stopped.value.code or 0) == code
        assert json.loads(out) == want
        assert bool(err) == (code == 2)
        assert not err or said(err)


def test_damage_outside_the_shards_is_not_repaired_in_silence(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    shutil.copytree(cache, place)
    _flip(place / "tokenizer" / "tokenizer.json" / "c" / "0")
    with pytest.raises(LogitcaskError, match=r"cannot be repaired: tokenizer/tokenizer\.json/c/0: bytes differ"):
        repair(place, verify(place))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_kills_at_random_moments_leave_the_same_bytes(tmp_path: Path) -> None:
    """After many SIGKILLs and one complete run, every file equals an uninterrupted run's."""
    teacher = make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS * 2)
    want = precompute_settings(tmp_path, output=tmp_path / "want", teacher_model=str(teacher), shard_positions=32)
    settings = want.model_copy(update={"output": tmp_path / "killed"})
    context = forks()
    _in_child(context, want)
    began = time.monotonic()
    _in_child(context, want.model_copy(update={"output": tmp_path / "timed"}))
    whole_run = time.monotonic() - began
    chance = random.Random(0)
    landed, most = 0, 0
    for _ in range(4 * KILLS):
        if landed == KILLS:
            break
        child = context.Process(target=_work, args=(settings,))
        child.start()
        time.sleep(chance.uniform(0.2, 0.9) * whole_run)
        if child.is_alive() and child.pid:
            os.kill(child.pid, signal.SIGKILL)
            landed += 1
        child.join()
        commits = Path(settings.output) / "commits" / "c"
        now = len(list(commits.iterdir())) if commits.exists() else 0
        assert now >= most, "a committed shard was lost"
        most = now
        if now == len(list((Path(want.output) / "commits" / "c").iterdir())):
            shutil.rmtree(settings.output)  # finished: start over, so that every kill interrupts work
            most = 0
    _in_child(context, settings)
    assert landed == KILLS
    assert folder_bytes(Path(settings.output)) == folder_bytes(Path(want.output))


def _work(settings: PrecomputeSettings) -> None:
    if not is_complete(settings.output):
        precompute(settings)


def _in_child(context: ForkServerContext, settings: PrecomputeSettings) -> None:
    child = context.Process(target=_work, args=(settings,))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_a_run_killed_before_its_manifest_is_started_over(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shard_positions=128)
    whole = folder_bytes(cache)
    shutil.rmtree(cache)
    cache.mkdir()
    (cache / "zarr.0123456789abcdef0123456789abcdef.partial").write_bytes(b"{")
    precompute(precompute_settings(tmp_path, shard_positions=128))
    assert folder_bytes(cache) == whole


def test_a_folder_of_somebody_else_is_never_written_to(tmp_path: Path) -> None:
    make_cache(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CacheFormatError, match="not a logit cache"):
            precompute(precompute_settings(tmp_path, output=other, overwrite=overwrite))
    assert folder_bytes(other) == {"thesis.txt": b"years of work"}
