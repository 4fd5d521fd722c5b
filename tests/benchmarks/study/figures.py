"""The study's figures, from its results: ``python -m tests.benchmarks.study.figures``. A label has one colour."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.labels import MIDDLE
from tests.benchmarks.study.report import RESULTS, STAGES, Key, Run, against_exact, by_key
from tests.benchmarks.study.students import LENGTHS, WINDOWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STYLES = {  # label: colour, marker; ours are blue or black
    "standard": ("#0072B2", "o"),
    "lean": ("#56B4E9", "s"),
    MIDDLE: ("#5E4FA2", "^"),
    "rich": ("#000000", "D"),
    "random sampling, 32": ("#009E73", "h"),
    "top-12 renormalised": ("#CC79A7", "P"),
    "top-64 renormalised": ("#D55E00", "v"),
    "top-64, one-token tail": ("#8C564B", "*"),
    "top-64 bucket": ("#E69F00", "X"),
}
BEHIND = "nats of KL to the teacher behind exact distillation"


def main() -> None:
    """Draw both figures beside the results."""
    students, second, gradients = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("students", "second", "gradients")
    )
    draw_students(of_teachers(students["runs"], second["runs"]), LENGTHS, RESULTS / "students.png")
    draw_gradients(
        [cell for cell in gradients["cells"] if cell["text"] == "code"],
        gradients["bytes_a_position"]["code"],
        RESULTS / "gradients.png",
    )


def of_teachers(first: Sequence[Run], second: Sequence[Run]) -> dict[str, Sequence[Run]]:
    """Return the runs that are drawn, by teacher."""
    parts = {"SmolLM2": [run for run in first if run["setting"]["seed"] < 100], "second teacher": list(second)}
    return {name: runs for name, runs in parts.items() if runs}


def draw_students(parts: dict[str, Sequence[Run]], steps: Sequence[int], path: Path) -> "Figure":
    """Plot KL to the teacher at T of training minus exact distillation's of the same seed, labels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2 * len(parts) + 0.8), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False, sharey=True)
    drawn: set[str] = set()
    for (teacher, runs), row in zip(parts.items(), axes, strict=True):
        groups = by_key(runs)
        ways = [way for way in STYLES if Key(way, 1.0, 0.0) in groups]
        for axis, t in zip(row, (1.0, 2.0), strict=True):
            for place, way in enumerate(ways):
                key = Key(way, t, 0.0)
                for number, length in enumerate(steps):
                    known = against_exact(groups, key, length, f"kl_at_{t:g}") if key in groups else None
                    if known is not None:
                        _point(axis, number + 0.8 * ((place + 0.5) / len(ways) - 0.5), *known, way)
                        drawn.add(way)
            _set_students_axis(axis, steps)
            axis.set(title=f"{teacher}, trained at T={t:g}, alpha 0")
        row[0].set_ylabel(BEHIND)
    figure.legend(handles=_legend(drawn), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure


def _point(axis: "Axes", x: float, y: float, error: float | None, way: str) -> None:
    """Draw a mean with its interval; hollow if it is of one seed, which has none."""
    color, marker = STYLES[way]
    face = "white" if error is None else color
    axis.errorbar(x, y, error or 0.0, color=color, marker=marker, markerfacecolor=face, capsize=3, zorder=3)


def _set_students_axis(axis: "Axes", steps: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    thousands = [f"{length * WINDOWS * POSITIONS / 1000:,.0f}" for length in steps]
    axis.set_xticks(range(len(steps)), labels=thousands)
    axis.set(xlabel="thousand target positions", xlim=(-0.5, len(steps) - 0.5))
    for border in range(1, len(steps)):
        axis.axvline(border - 0.5, color="#BBBBBB", linewidth=0.8)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.8)
    ticks = (-1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0)
    axis.set_yticks(ticks, labels=[f"{tick:+g}" if tick else "0" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", alpha=0.3)


def draw_gradients(cells: Sequence[Run], sizes: dict[str, float], path: Path) -> "Figure":
    """Plot the angle by label (above; a panel per temperature) and by the batch (below)."""
    from matplotlib.figure import Figure

    temperatures = sorted({cell["temperature"] for cell in cells})
    figure = Figure(figsize=(3.9 * len(temperatures), 8.4), layout="constrained")
    above, below = figure.subplots(2, len(temperatures), squeeze=False, sharey=True)
    ways = sorted((way for way in STYLES if way in sizes), key=sizes.__getitem__)
    for column, t in enumerate(temperatures):
        here = {cell["stage"]: cell for cell in cells if cell["temperature"] == t}
        stages = [stage for stage in STAGES if stage in here]
        middle = here.get("early", here[stages[0]])
        for place, way in enumerate(ways):
            color, marker = STYLES[way]
            how: dict[str, Any] = {"color": color, "marker": marker, "linewidth": 0.8}
            known = [stage for stage in stages if way in here[stage]["ways"]]
            x = [place + 0.24 * (STAGES.index(stage) - 1) for stage in known]
            above[column].plot(x, [here[stage]["ways"][way]["angle"][-1] for stage in known], **how)
            if way in middle["ways"]:
                below[column].plot(middle["batches"], middle["ways"][way]["angle"], **how)
        above[column].set(title=f"T={t:g}", xlabel=f"bytes per position; {', '.join(STAGES)} student")
        above[column].set_xticks(range(len(ways)), labels=[f"{sizes[way]:.0f}" for way in ways])
        below[column].set(xscale="log", xlabel=f"windows per batch, {middle['stage']} student")
        below[column].set_xticks(middle["batches"], labels=[str(batch) for batch in middle["batches"]])
        below[column].minorticks_off()
        for axis in (above[column], below[column]):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}°")
            axis.grid(axis="y", alpha=0.3)
    above[0].set_ylabel("angle to the exact gradient")
    below[0].set_ylabel("angle to the exact gradient")
    figure.legend(handles=_legend(ways), loc="outside lower center", ncols=len(ways))
    figure.savefig(path, dpi=150)
    return figure


def _legend(ways: Sequence[str] | set[str]) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    known = [(way, *STYLES[way]) for way in STYLES if way in ways]
    return [Line2D([], [], color=color, marker=marker, linestyle="", label=way) for way, color, marker in known]


if __name__ == "__main__":
    main()
