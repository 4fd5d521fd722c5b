"""The study's results: one JSON with machine, versions and date, a table, and a figure."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.benchmarks.study.labels import POSITIONS, WAYS
from tests.benchmarks.study.students import CONFIG, LENGTHS, WINDOWS, new_student, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("tests/benchmarks/results")
# two-sided 95 % quantiles of Student's t, by degrees of freedom
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
STAGE_MARKERS = {"fresh": "o", "early": "^", "late": "s"}

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


def draw(parts: dict[str, Sequence[Run]], steps: Sequence[int], path: Path) -> "Figure":
    """Plot KL to the teacher at T of training minus exact distillation's of the same seed; a label has one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False)
    for (teacher, runs), row in zip(parts.items(), axes, strict=True):
        groups = by_key(runs)
        ways = {way: number for number, way in enumerate(WAYS) if Key(way, 1.0, 0.0) in groups}
        for axis, t in zip(row, (1.0, 2.0), strict=True):
            for way, number in ways.items():
                key = Key(way, t, 0.0)
                found = {s: against_exact(groups, key, s, f"kl_at_{t:g}") for s in steps if key in groups}
                thousands = WINDOWS * POSITIONS / 1000 * (1 + 0.01 * number)
                known = [(steps * thousands, *pair) for steps, pair in found.items() if pair is not None]
                if known:
                    x, y, error = zip(*known, strict=True)
                    bars = [e or 0.0 for e in error]
                    axis.errorbar(x, y, bars, marker="o", capsize=3, label=way, color=f"C{number}")
            axis.axhline(0.0, color="black", linewidth=0.8)
            axis.set(title=f"{teacher}, trained at T={t:g}, alpha 0", xlabel="thousand target positions")
        row[0].set_ylabel("KL to the teacher less exact KD's, nats")
    legend: dict[str, Any] = {}
    for axis in axes[:, 0]:
        handles, names = axis.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure


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


def draw_gradients(cells: Sequence[Run], sizes: dict[str, float], path: Path) -> None:
    """Plot the angle against bytes per position (above; a panel per temperature) and against the batch (below)."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    temperatures = sorted({c["temperature"] for c in cells})
    figure = Figure(figsize=(4.5 * len(temperatures), 8), layout="constrained")
    above, below = figure.subplots(2, len(temperatures), squeeze=False, sharey="row")
    for column, t in enumerate(temperatures):
        here = [c for c in cells if c["temperature"] == t]
        middle = next((c for c in here if c["stage"] == "early"), here[0])
        for number, way in enumerate(here[0]["ways"]):
            color = f"C{number}"
            for c in here:
                marker = STAGE_MARKERS[c["stage"]]
                above[column].plot(sizes[way], c["ways"][way]["angle"][-1], marker, color=color)
            below[column].plot(middle["batches"], middle["ways"][way]["angle"], ".-", color=color, label=way)
        above[column].set(title=f"T={t:g}", xscale="log", yscale="log", xlabel="bytes a position")
        below[column].set(xscale="log", yscale="log", xlabel=f"windows a batch, {middle['stage']} student")
        for axis, ticks in ((above[column], (25, 50, 100, 200)), (below[column], middle["batches"])):
            axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
            axis.minorticks_off()
    above[0].set_ylabel("degrees to the exact gradient")
    below[0].set_ylabel("degrees to the exact gradient")
    labels = [Line2D([], [], color=line.get_color(), label=line.get_label()) for line in below[0].lines]
    stages = [Line2D([], [], color="black", marker=m, linestyle="", label=name) for name, m in STAGE_MARKERS.items()]
    figure.legend(handles=labels + stages, loc="outside lower center", ncols=len(labels + stages))
    figure.savefig(path, dpi=150)


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
    """Write results/gradients.json and .png, and print the tables."""
    order = list(STAGE_MARKERS)
    cells = sorted(read(folder, "*_T*.json"), key=lambda c: (c["text"], c["temperature"], order.index(c["stage"])))
    if not cells:
        return
    sizes = {path.stem.removeprefix("sizes_"): json.loads(path.read_text()) for path in folder.glob("sizes_*.json")}
    write_result("gradients", {"bytes_a_position": sizes, "cells": cells})
    for text in sorted({c["text"] for c in cells}):
        console.print(gradient_table(cells, text))
    draw_gradients([c for c in cells if c["text"] == "code"], sizes["code"], RESULTS / "gradients.png")


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
    """Write results/students.json, second.json and students.png and those of other parts, and print the tables."""
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
    draw(parts, LENGTHS, RESULTS / "students.png")
