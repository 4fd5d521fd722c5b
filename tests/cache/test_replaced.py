"""A cache that is replaced under an open reader is not read on, in this process or in another."""

import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.integrity import read_verified
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.cache.verify import verify
from logitcask.cache.writer import CacheWriter
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.precompute.precompute import precompute
from tests.support.tiny import folder_bytes, make_cache, make_teacher, precompute_settings

READS: list[Callable[[CacheReader], object]] = [
    lambda reader: reader.shard(1),
    lambda reader: reader.example(len(reader) - 1),
    lambda reader: reader.counts("token_count", range(4)),
    lambda reader: reader.shard_fidelity(2),
    lambda reader: reader.made_by(2),
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches of one plan, by different teachers."""
    place = tmp_path_factory.mktemp("replaced")
    ours = make_cache(place, output=place / "ours")
    theirs = make_cache(place, make_teacher(place / "other", seed=1), output=place / "theirs")
    assert CacheReader(ours).manifest.shards == CacheReader(theirs).manifest.shards
    return ours, theirs


def replace(place: Path, other: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(other, place)


@pytest.mark.parametrize("read", READS)
def test_a_read_after_a_replacement_is_refused(
    caches: tuple[Path, Path], tmp_path: Path, read: Callable[[CacheReader], object]
) -> None:
    shutil.copytree(caches[0], tmp_path / "c")
    reader = CacheReader(tmp_path / "c")
    reader.shard(0)
    replace(tmp_path / "c", caches[1])
    with pytest.raises(CacheMismatchError, match="replaced by another cache"):
        read(reader)
    read(CacheReader(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(CacheMismatchError, match="or removed, while it was read"):
        read(reader)


def test_a_replacement_in_the_middle_of_a_read_is_refused(
    caches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever object is the last of the old cache."""
    for last in (1, 5, 11):
        place = tmp_path / f"c{last}"
        shutil.copytree(caches[0], place)
        reader, count = CacheReader(place), itertools.count(1)

        def counting(*given: object, **named: object) -> bytes:
            data = read_verified(*given, **named)  # type: ignore[arg-type]
            if next(count) == last:  # noqa: B023
                replace(place, caches[1])  # noqa: B023
            return data

        with monkeypatch.context() as patch:
            patch.setattr("logitcask.cache.reader.read_verified", counting)
            with pytest.raises(CacheMismatchError):
                reader.shard(0)


def test_overwriting_stage_1_shows_no_mixture(
    caches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader opened before sees, while the other teacher's shards come, only its own labels or an error."""
    shutil.copytree(caches[0], tmp_path / "c")
    wanted = CacheReader(caches[0]).shard(0)
    reader = CacheReader(tmp_path / "c")
    outcomes: list[str] = []
    write_shard = CacheWriter.write_shard

    def spy(self: CacheWriter, index: int, shard: object) -> None:
        write_shard(self, index, shard)  # type: ignore[arg-type]
        reader._decoded.clear()
        try:
            np.testing.assert_array_equal(reader.shard(0).targets.head_ids, wanted.targets.head_ids)
            outcomes.append("ours")
        except CacheMismatchError:
            outcomes.append("refused")

    monkeypatch.setattr(CacheWriter, "write_shard", spy)
    settings = precompute_settings(caches[0].parent, teacher_model=str(caches[0].parent / "other"))
    precompute(settings.model_copy(update={"output": tmp_path / "c", "overwrite": True}))
    assert outcomes == ["refused"] * 4


def test_a_worker_opens_the_cache_that_its_parent_opened(caches: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(caches[0], tmp_path / "c")
    parent = CacheExamples(str(tmp_path / "c"), with_targets=True)
    assert len(parent) == 24
    worker = copy.copy(parent)
    assert len(worker[3].encoded.input_ids)
    late = copy.copy(parent)
    replace(tmp_path / "c", caches[1])
    with pytest.raises(CacheMismatchError):
        late[3]
    checked = CacheReader(caches[0]).opened
    with pytest.raises(CacheMismatchError):
        CacheExamples(str(tmp_path / "c"), with_targets=True, opened=checked)[3]


def test_a_copy_of_a_source_that_is_replaced_is_refused(caches: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "c"
    shutil.copytree(caches[0], source)
    with pytest.raises(LogitcaskError):
        copy_cache(str(source), str(tmp_path / "copy"), None, lambda _: replace(source, caches[1]))
    assert describe(tmp_path / "copy").shards_committed == 1
    assert CacheReader(tmp_path / "copy", partial=True).manifest == CacheReader(caches[0]).manifest


def test_the_same_cache_made_again_is_read_on(caches: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(caches[0], tmp_path / "c")
    reader = CacheReader(tmp_path / "c")
    replace(tmp_path / "c", caches[0])
    for read in READS:
        read(reader)
    assert verify(tmp_path / "c").problems == []
    assert folder_bytes(tmp_path / "c") == folder_bytes(caches[0])
