"""Results of benchmarks are recorded with machine and date, and a regression beyond noise fails."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.record import Ratio, record

QUIET = [1.0, 1.01, 0.99]


def test_a_ratio_that_is_worse_beyond_noise_fails_and_is_not_recorded(tmp_path: Path) -> None:
    record("step", {"ours / plain": Ratio([0.8, 0.81, 0.79], QUIET), "speed": Ratio([2.0] * 3, QUIET, True)}, tmp_path)
    first = json.loads((tmp_path / "step.json").read_text())
    assert first["ratios"]["ours / plain"]["ratio"] == pytest.approx(0.8)
    assert first["ratios"]["ours / plain"]["other"] == 1.0
    assert {"cpu", "cores", "versions", "date"} <= first.keys()
    record("step", {"ours / plain": Ratio([0.82, 0.83, 0.81], QUIET)}, tmp_path)  # within the noise
    second = json.loads((tmp_path / "step.json").read_text())
    assert second["ratios"]["ours / plain"]["ratio"] == pytest.approx(0.82)
    assert second["ratios"]["speed"] == first["ratios"]["speed"], "not measured this time"
    with pytest.raises(SystemExit) as stopped:
        record("step", {"ours / plain": Ratio([0.9, 0.91, 0.89], QUIET)}, tmp_path)
    assert str(stopped.value.code).startswith("step: ours / plain is 0.900, recorded 0.820 on ")
    assert json.loads((tmp_path / "step.json").read_text()) == second
    with pytest.raises(SystemExit):
        record("step", {"speed": Ratio([1.8] * 3, QUIET, True)}, tmp_path)
    record("step", {"speed": Ratio([3.0] * 3, QUIET, True), "ours / plain": Ratio([0.5] * 3, QUIET)}, tmp_path)


def test_a_noisy_measurement_is_no_regression(tmp_path: Path) -> None:
    record("step", {"ours / plain": Ratio([0.8] * 3, QUIET)}, tmp_path)
    record("step", {"ours / plain": Ratio([0.7, 0.95, 1.2], QUIET)}, tmp_path)
