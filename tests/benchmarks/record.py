"""What a benchmark measured, kept in results/ with machine, versions and date; a ratio that got worse is a failure.

Only ratios of two measurements of one run are compared: seconds depend on the machine.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.study.report import RESULTS, machine

FLOOR = 0.03  # relative: what the same code may differ by on another day


@dataclass(frozen=True)
class Ratio:
    """Two measurements, each of several rounds in which they took turns."""

    one: Sequence[float]
    other: Sequence[float]
    more_is_better: bool = False

    def values(self) -> dict[str, float | bool]:
        """Return the ratio of the medians, both numbers, and its noise: half the range over the rounds."""
        rounds = [a / b for a, b in zip(self.one, self.other, strict=False)]
        one, other = median(self.one), median(self.other)
        noise = (max(rounds) - min(rounds)) / 2
        return {"ratio": one / other, "one": one, "other": other, "noise": noise, "more_is_better": self.more_is_better}


def record(name: str, ratios: Mapping[str, Ratio], folder: Path = RESULTS) -> None:
    """Write ``NAME.json``, or keep the one that is there and exit with 1 and what is worse than in it."""
    file = folder / f"{name}.json"
    found = {each: ratio.values() for each, ratio in ratios.items()}
    if file.exists():
        known = json.loads(file.read_text())
        worse = [
            f"{name}: {each} is {found[each]['ratio']:.3f}, recorded {then['ratio']:.3f} on {known['date']}"
            for each, then in known["ratios"].items()
            if each in found and is_worse(found[each], then)
        ]
        if worse:
            sys.exit("\n".join([*worse, f"if that is meant, delete {file} and measure again"]))
        found = {**known["ratios"], **found}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**machine(), "ratios": found}, indent=1) + "\n")


def is_worse(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Return whether a ratio is worse than the recorded one by more than the noise of both, and the floor."""
    gap = then["ratio"] - now["ratio"] if then["more_is_better"] else now["ratio"] - then["ratio"]
    return bool(gap > now["noise"] + then["noise"] + FLOOR * then["ratio"])
