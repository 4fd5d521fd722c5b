"""The check for a machine with a GPU, on the CPU: every part runs, and what is wrong or missing is named."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import check
from tests.gpu.rows import Place, Row


def test_all_of_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check.run("cpu", tmp_path, tiny=True, minutes=60)  # CI may be slow
    text = report.write()
    assert not [row for _, row in report.rows if row.passed is False]
    assert not report.left_out
    assert {name for name, _ in report.rows} == {part.name for part in check.PARTS}
    document = json.loads((tmp_path / "check.json").read_text())
    assert len(document["rows"]) == len(report.rows) >= 30
    assert (tmp_path / "check.md").read_text() == text
    assert "| sampled, forward-kl, T=2, scale 1, cap none | yes |" in text
    assert "whole steps: tiny" in capsys.readouterr().out


def wrong(place: Place) -> Iterator[Row]:
    yield Row("one", {"error": 1.0}, passed=False)
    raise RuntimeError("device-side assert")


def test_what_is_wrong_missing_or_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        check.Part("wrong", "test_check:wrong", (), 10),
        check.Part("missing", "test_check:wrong", ("numpy", "no-such-package"), 10),
    )
    monkeypatch.setattr(check, "PARTS", parts)
    lowest = tmp_path / "lowest.txt"
    lowest.write_text("# a comment\nnumpy==2.0.2\nno-such-package==1.0\npackaging==999\n")
    monkeypatch.setattr(check, "LOWEST", lowest)
    report = check.run("cpu", tmp_path, tiny=True)
    assert [row.name for _, row in report.rows] == ["one", "stopped: RuntimeError: device-side assert"]
    assert report.left_out == ["missing: no-such-package is missing"]
    old = check.installed("packaging")
    assert report.head["problems"] == [
        "no-such-package is missing",
        f"packaging {old} is older than 999: what needs it may fail",
    ]
    assert "| one | **no** | 1 |" in report.write()
    report = check.run("cpu", tmp_path, tiny=True, minutes=0.0)
    assert report.left_out[0] == "wrong: its time was up after 0 rows"
