"""The study's results: one JSON with machine, versions and date, and a table."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.students import CONFIG, LENGTHS, WINDOWS, new_student, write_atomically

RESULTS = Path("tests/benchmarks/results")
# two-sided 95 % quantiles of Student's t, by degrees of freedom
T_95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201), start=1))
STAGES = ("fresh", "early", "late")  # students of so many steps, ascending

Run = dict[str, Any]


class Key(NamedTuple):
    """What the runs of several seeds share."""

    way: str
    temperature: float
    alpha: float
    training: str = "usual"


def machine() -> dict[str, Any]:
    """Return the machine and the versions that made the figures."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = {name: version(name) for name in ("torch", "transformers", "numpy", "zarr")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % confidence interval over seeds, None for a single seed."""
    if len(values) < 2:
        return values[0], None
    return statistics.mean(values), T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def by_key(runs: Sequence[Run]) -> dict[Key, dict[int, Run]]:
    """Group runs by way, temperature, alpha and training, then by seed."""
    found: dict[Key, dict[int, Run]] = {}
    for run in runs:
        s = run["setting"]
        key = Key(s["way"], s["temperature"], s["alpha"], s.get("training", "usual"))
        found.setdefault(key, {})[s["seed"]] = run
    return found


def measured(run: Run, steps: int, name: str) -> float | None:
    """Return a figure of a run at a length."""
    return next((float(at[name]) for at in run["lengths"] if at["steps"] == steps), None)


def against_exact(
    groups: dict[Key, dict[int, Run]], key: Key, steps: int, name: str
) -> tuple[float, float | None] | None:
    """Return the mean difference, with interval, to exact distillation at equal seed, temperature, alpha, training."""
    return against(groups, key, key._replace(way="exact"), steps, name)


def against(
    groups: dict[Key, dict[int, Run]], key: Key, base: Key, steps: int, name: str
) -> tuple[float, float | None] | None:
    """Return the mean difference to another setting of the same seed, and its interval over the seeds of both."""
    found = differences(groups, key, base, steps, name)
    return interval(list(found.values())) if found else None


def differences(groups: dict[Key, dict[int, Run]], key: Key, base: Key, steps: int, name: str) -> dict[int, float]:
    """Return a figure minus another setting's, for the seeds of both."""
    own, others = groups.get(key, {}), groups.get(base, {})
    pairs = {s: (measured(own[s], steps, name), measured(others[s], steps, name)) for s in own if s in others}
    return {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}


def _cell(value: tuple[float, float | None] | None, sign: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{value[0]:+.3f}" if sign else f"{value[0]:.3f}"
    return mean if value[1] is None else f"{mean} ± {value[1]:.3f}"


def table(runs: Sequence[Run], steps: int, teacher: str) -> Table:
    """Return one line per way: means over seeds, and paired differences to exact distillation."""
    groups = by_key(runs)
    found = Table("label", "T", "alpha", "seeds", "KL at T=1", "KL at T=2", "hard loss", "to exact, KL at own T", "ECE")
    found.title = (
        f"teacher {teacher}, after {steps} steps, {steps * WINDOWS * POSITIONS:,} positions; nats, ± 95 % over seeds"
    )
    for key in sorted(groups, key=lambda k: (*k[1:], k.way != "exact", k.way)):
        cells = []
        for name in ("kl_at_1", "kl_at_2", "hard_loss", "calibration_error"):
            values = [v for run in groups[key].values() if (v := measured(run, steps, name)) is not None]
            cells.append(_cell(interval(values)) if values else "")
        to_exact = against_exact(groups, key, steps, f"kl_at_{key.temperature:g}")
        name = key.way if key.training == "usual" else f"{key.way}; {key.training}"
        found.add_row(
            name,
            f"{key.temperature:g}",
            f"{key.alpha:g}",
            str(len(groups[key])),
            *cells[:3],
            _cell(to_exact, True),
            cells[3],
        )
    return found


def gradient_table(cells: Sequence[Run], text: str) -> Table:
    """Return angles of gradient and update to exact distillation's over the largest batch, by stage."""
    chosen = [c for c in cells if c["text"] == text]
    columns = [(c["temperature"], c["stage"]) for c in chosen]
    found = Table("label", *[f"T={t:g} {stage}" for t, stage in columns])
    found.title = f"{text}: degrees of the gradient / of AdamW's update to exact, a batch of {chosen[0]['batches'][-1]}"
    for way in chosen[0]["ways"]:
        values = [c["ways"][way] for c in chosen]
        found.add_row(way, *[f"{v['angle'][-1]:.1f} / {v['update_angle'][-1]:.1f}" for v in values])
    return found


def read(folder: Path, pattern: str) -> list[Run]:
    """Return the content of a folder's JSON files, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]


def write_result(name: str, found: dict[str, Any]) -> None:
    """Write a result with the machine that made it; an equal one that exists keeps its machine."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known.pop("machine", None)
    if known != json.loads(json.dumps(found)):
        write_atomically(path, {"machine": machine(), **found})


def report_gradients(folder: Path, console: Console) -> None:
    """Write results/gradients.json, and print the tables."""
    cells = sorted(read(folder, "*_T*.json"), key=lambda c: (c["text"], c["temperature"], STAGES.index(c["stage"])))
    if not cells:
        return
    sizes = {path.stem.removeprefix("sizes_"): json.loads(path.read_text()) for path in folder.glob("sizes_*.json")}
    write_result("gradients", {"bytes_a_position": sizes, "cells": cells})
    for text in sorted({c["text"] for c in cells}):
        console.print(gradient_table(cells, text))


def report_designs(paths: dict[str, Path], console: Console) -> None:
    """Write results/designs.json, by teacher, and print the tables."""
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    if not found:
        return
    write_result("designs", {"teachers": found})
    for name, one in found.items():
        by_t = one["temperatures"]
        shown = Table("design", "entries", *[f"T={t}" for t in by_t])
        shown.title = f"teacher {name}: squared error of the weights, of what is stored; {one['positions']:,} positions"
        for design, first in next(iter(by_t.values()))["designs"].items():
            parts = [f"{at['designs'][design]['squared_error']:.2f}" for at in by_t.values()]
            shown.add_row(design, f"{first['entries']:.1f}", *parts)
        console.print(shown)


def report(folder: Path) -> None:
    """Write results/students.json, second.json and those of other parts, and print the tables."""
    console = Console(width=170)
    designs = {"SmolLM2": folder.parent / "designs.json", "second": folder.parent / "second" / "designs.json"}
    report_designs(designs, console)
    report_gradients(folder.parent / "fidelity", console)
    runs = read(folder, "*.json")
    if not runs:
        raise SystemExit(f"{folder}: no run is finished yet")
    student = new_student(49_152, 0)
    about = {
        "teacher": "SmolLM2-135M-Instruct (Q4_1, in float32)",
        "student": {**CONFIG, "parameters": sum(p.numel() for p in student.parameters())},
        "windows_a_step": WINDOWS,
        "positions_a_window": POSITIONS,
    }
    write_result("students", {"study": about, "runs": runs})
    parts: dict[str, Sequence[Run]] = {"SmolLM2": [run for run in runs if run["setting"]["seed"] < 100]}
    if others := read(folder.parent / "second" / "runs", "*.json"):
        write_result("second", {"teacher": "trained for the study, vocabulary of 8,192", "runs": others})
        parts["second"] = others
    for teacher, of_teacher in parts.items():
        for length in LENGTHS:
            console.print(table(of_teacher, length, teacher))
