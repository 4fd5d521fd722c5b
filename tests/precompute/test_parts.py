"""Several processes write one cache: parts side by side, never two writers in one shard."""

import threading
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.ownership import sole_writer
from logitcask.pipeline.precompute.precompute import precompute
from tests.support.tiny import folder_bytes, make_cache, make_teacher, precompute_settings


def test_parts_in_any_order_give_the_bytes_of_one_run(tmp_path: Path) -> None:
    whole = make_cache(tmp_path, make_teacher(tmp_path / "teacher"))
    for part in ("3/3", "1/3", "2/3", "2/3"):
        precompute(precompute_settings(tmp_path, output=tmp_path / "parts", shards=part))
    assert folder_bytes(tmp_path / "parts") == folder_bytes(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_plain_run_finishes_what_parts_left(tmp_path: Path) -> None:
    whole = make_cache(tmp_path, make_teacher(tmp_path / "teacher"))
    settings = precompute_settings(tmp_path, output=tmp_path / "parts")
    precompute(settings.model_copy(update={"shards": "2/2"}))
    assert precompute(settings).shards_found == 2
    assert folder_bytes(Path(settings.output)) == folder_bytes(whole)


@pytest.mark.parametrize(
    ("first", "second"), [(None, None), (None, (1, 2)), ((1, 2), None), ((1, 2), (1, 2)), ((1, 2), (2, 3))]
)
def test_runs_that_might_share_a_shard_are_refused(
    tmp_path: Path, first: tuple[int, int] | None, second: tuple[int, int] | None
) -> None:
    cache = tmp_path / "cache"
    refused = pytest.raises(LogitcaskError, match="another run is writing")
    with sole_writer(cache, first), refused, sole_writer(cache, second):
        pass
    assert not list(tmp_path.iterdir())


def test_different_parts_hold_the_cache_together(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "cache", (1, 2)) as one, sole_writer(tmp_path / "cache", (2, 2)) as two:
        assert one != two
    assert not list(tmp_path.iterdir())


def test_files_staged_by_another_part_are_left_alone(tmp_path: Path) -> None:
    """It may be running on a machine whose locks are invisible here, or was killed and will be run again."""
    staged = tmp_path / ".cache.staging/1-of-2"
    staged.mkdir(parents=True)
    with sole_writer(tmp_path / "cache", (2, 2)):
        pass
    assert staged.exists()
    assert (tmp_path / ".cache.lock").exists()
    with sole_writer(tmp_path / "cache", (1, 2)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_machine_removed_is_retried(tmp_path: Path) -> None:
    """A client of a network folder may for a while see a name that exists but cannot be opened."""
    (tmp_path / ".cache.lock").symlink_to(tmp_path / "away/lock")
    back = threading.Timer(0.2, (tmp_path / "away").mkdir)
    back.start()
    with sole_writer(tmp_path / "cache", (1, 2)):
        assert (tmp_path / "away/lock").exists()
    (tmp_path / ".cache.lock").symlink_to(tmp_path / "gone/lock")
    with pytest.raises(LogitcaskError, match="cannot write the cache: No such file"), sole_writer(tmp_path / "cache"):
        pass


@pytest.mark.parametrize("value", ["3/2", "0/2", "1", "a/b", "1/2/3"])
def test_invalid_parts_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match="must be i/n with i from 1 to n"):
        precompute_settings(tmp_path, shards=value)


def test_a_part_does_not_overwrite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--overwrite cannot be combined with --shards"):
        precompute_settings(tmp_path, shards="1/2", overwrite=True)
