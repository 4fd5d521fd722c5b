"""Progress off a terminal: a line every minute, of time, amount, share, speed and time left; nothing with --quiet."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitcask.cache.reader import CacheReader
from logitcask.pipeline import console
from logitcask.pipeline.cli import main
from logitcask.pipeline.console import QUIET, progress_line, track
from tests.support.tiny import make_cache


@pytest.mark.parametrize(
    ("done", "total", "unit", "seconds", "note", "want"),
    [
        (48_210, 786_400, "tokens", 2.0, "", "labelling 48,210/786,400  6.1%  24,105 tokens/s  1 min left"),
        (1, 400, "prompts", 60.0, "$0.02", "labelling 1/400  0.2%  0.017 prompts/s  6.7 h left  $0.02"),
        (1_000, None, "examples", 10.0, "", "labelling 1,000  100 examples/s"),
        (5, 5, "shards", 10.0, "", "labelling 5/5  100.0%  0.5 shards/s"),
    ],
)
def test_a_line_of_progress(done: int, total: int | None, unit: str, seconds: float, note: str, want: str) -> None:
    place = want.split("  ", maxsplit=1)[0]
    line = progress_line(place, done, total, unit, seconds, note)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  " + re.escape(want), line), line


def test_stage_1_prints_lines_off_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    cache = make_cache(tmp_path)
    err = capsys.readouterr().err
    count = CacheReader(cache).manifest.shards.count
    lines = re.findall(r"^\d\d:\d\d:\d\d  shard (\d+)/(\d+)  [\d.]+%  .* tokens/s", err, re.M)
    assert {number for number, _ in lines} == {str(number + 1) for number in range(count)}
    assert {total for _, total in lines} == {str(count)}
    assert re.search(rf"^\d\d:\d\d:\d\d  shard {count}/{count}  100.0%  \S+ tokens/s$", err, re.M)


def test_stage_1_prints_a_line_however_quick_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cache(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["data", "teacher"]
    assert re.search(r"^data      24 examples, 486 tokens, 231 target positions$", lines[0])
    assert len([line for line in lines if " shard " in line]) == 1


def test_other_commands_print_them_too_but_not_with_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    for quiet in ([], ["--quiet"]):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["logitcask", *quiet, "cache", "verify", str(cache)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        err = capsys.readouterr().err
        assert ("verifying" in err) == (not quiet)
        assert not (quiet and err)


def test_a_thread_is_as_quiet_as_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A context variable has its default in a new thread."""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    token = QUIET.set(True)
    try:
        with track("asking", 8, "prompts") as advance, ThreadPoolExecutor(4) as pool:
            list(pool.map(advance, [1] * 8))
    finally:
        QUIET.reset(token)
    assert capsys.readouterr().err == ""


def test_lines_come_ever_more_rarely_up_to_one_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 6.0, 14.0, 17.0, 38.0, 60.0, 80.0, 139.0, 141.0])
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: next(clock))
        with track("asking", 10, "prompts") as advance:
            for _ in range(9):
                advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in lines] == [f"asking {done}/10" for done in (2, 4, 5, 7, 9)]
