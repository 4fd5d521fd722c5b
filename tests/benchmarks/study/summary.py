"""The README's tables of the study, as Markdown, from what stands in tests/benchmarks/results."""

import json
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.study.report import RESULTS, Key, Run, against_exact, by_key, interval, measured

NONE = "–"


def found(values: tuple[float, float | None] | None, sign: str = "") -> str:
    """A mean and its interval."""
    if values is None:
        return NONE
    mean = f"{values[0]:{sign}.2f}"
    return mean if values[1] is None else f"{mean} ± {values[1]:.2f}"


def figure(groups: dict[Key, dict[int, Run]], key: Key, steps: int, name: str) -> tuple[float, float | None] | None:
    """Mean and interval of a figure over the seeds of a setting."""
    values = [value for run in groups.get(key, {}).values() if (value := measured(run, steps, name)) is not None]
    return interval(values) if values else None


def at_own_temperature(groups: dict[Key, dict[int, Run]], way: str, steps: int) -> list[str]:
    """Of T=1 and 2: KL at the temperature of training, and how far from exact distillation's of the same seeds."""
    cells = []
    for t in (1.0, 2.0):
        name, key = f"kl_at_{t:g}", (way, t, 0.0)
        cells.append(found(figure(groups, key, steps, name)))
        cells.append(found(against_exact(groups, key, steps, name) if key in groups and way != "exact" else None, "+"))
    return cells


def labels_table(runs: Sequence[Run], gradients: dict[str, Any], steps: int) -> list[str]:
    """One line a label: bytes, angles of the late student's largest batch of code, what students came to."""
    groups, sizes = by_key(runs), gradients["bytes_a_position"]["code"]
    late = {c["temperature"]: c["ways"] for c in gradients["cells"] if c["text"] == "code" and c["stage"] == "late"}
    lines = [
        "| label | bytes | gradient, T=1 | T=2 | AdamW, T=1 | T=2 | KL, T=1 | to exact | KL, T=2 | to exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ("exact", *sizes, "standard, half bucket"):
        angles = [
            f"{late[t][way][name][-1]:.1f}°" if way in sizes else NONE
            for name in ("angle", "update_angle")
            for t in (1.0, 2.0)
        ]
        size = f"{sizes[way]:.0f}" if way in sizes else NONE
        lines.append(f"| {' | '.join([way, size, *angles, *at_own_temperature(groups, way, steps)])} |")
    output = found(figure(groups, ("output", 1.0, 1.0), steps, "kl_at_1"))
    at_two = found(figure(groups, ("output", 1.0, 1.0), steps, "kl_at_2"))
    lines.append(f"| {' | '.join(['no label: `output`', *[NONE] * 5, output, NONE, at_two, NONE])} |")
    return lines


def settings_table(runs: Sequence[Run], lengths: Sequence[int], way: str = "standard") -> list[str]:
    """One line an alpha and T, of one label: held-out hard loss, KL at T=1 and calibration error, by length."""
    groups = by_key(runs)
    names = {"hard loss": "hard_loss", "KL at T=1": "kl_at_1", "calibration error": "calibration_error"}
    heads = [f"{title}, {steps} steps" for title in names for steps in lengths]
    lines = [f"| alpha | T | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    keys: list[Key] = [("output", 1.0, 1.0), *[(way, t, alpha) for alpha in (0.5, 0.0) for t in (1.0, 2.0)]]
    for key in keys:
        cells = [found(figure(groups, key, steps, name)) for name in names.values() for steps in lengths]
        lines.append(f"| {key[2]:g} | {f'{key[1]:g}' if key[2] < 1 else NONE} | {' | '.join(cells)} |")
    return lines


def tables() -> list[str]:
    """All of them, of the results as they stand."""
    students = json.loads((RESULTS / "students.json").read_text(encoding="utf-8"))
    gradients = json.loads((RESULTS / "gradients.json").read_text(encoding="utf-8"))
    runs = [run for run in students["runs"] if run["setting"]["seed"] < 100]
    steps = max(at["steps"] for run in runs for at in run["lengths"])
    return [*labels_table(runs, gradients, steps), "", *settings_table(runs, (75, 300)), ""]


if __name__ == "__main__":
    print("\n".join(tables()))
