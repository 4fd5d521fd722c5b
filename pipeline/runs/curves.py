"""Plots of runs: losses and perplexity of training and held-out examples. Needs the extra ``plot``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.cache.report.plot import require_plot
from logitcask.pipeline.runs.run_folder import Line, curve, read_log, run_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {  # logged quantity: title, unit
    "total_loss": ("total loss: alpha hard + (1 - alpha) soft", "nats per target position"),
    "hard_loss": ("hard loss", "nats per target position"),
    "soft_loss": ("soft loss: T² times the divergence", "nats per target position"),
    "perplexity": ("perplexity", "perplexity, log scale"),
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")  # for all eyes
MARKERS = "os^DvPX*"
GRAY = "#666666"
TRAINING: dict[str, Any] = {"linestyle": "-", "linewidth": 1.0, "alpha": 0.55}
HELD_OUT: dict[str, Any] = {"linestyle": "--", "linewidth": 1.6, "markersize": 5}
TEACHER: dict[str, Any] = {"linestyle": ":", "linewidth": 1.6}
POINTS = 60  # of a curve of training; if more were logged, each is the mean of several


def plot_runs(runs: Sequence[Path], file: Path) -> int:
    """Draw the curves of runs by step to a file and return their number. Raises LogitcaskError if it cannot be done."""
    require_plot(file, "--output")
    logs = [read_log(run) for run in runs]
    return draw_curves(dict(zip(run_names(runs), logs, strict=True)), file, by_tokens=False)


def draw_curves(logs: Mapping[str, Sequence[Line]], file: Path, *, by_tokens: bool) -> int:
    """Draw ``PANELS`` to a file, a colour and a marker per run, and return the number of curves.

    A soft loss that is 0 throughout, as of a run without soft labels, is omitted. The teacher's own loss on the
    held-out examples is a line where the logs have it. If one has no tokens, steps are the axis of all. Raises
    LogitcaskError if values are too large to draw.
    """
    from matplotlib.figure import Figure

    by_tokens = by_tokens and all(any(line.get("tokens") for line in lines) for lines in logs.values())
    figure = Figure(figsize=(12, 8.4 + 0.2 * len(logs)), layout="constrained")
    drawn = 0
    for axes, (name, (title, unit)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for number, lines in enumerate(logs.values()):
            drawn += _draw_run(axes, lines, name, number, by_tokens=by_tokens)
        _draw_teachers(axes, logs, name)
        axes.set(title=title, ylabel=unit, xlabel="tokens trained on" if by_tokens else "optimizer step")
        _set_ticks(axes, by_tokens=by_tokens, by_decades=name == "perplexity")
        axes.grid(alpha=0.3)
    if drawn:
        _legend(figure, list(logs))
    try:
        figure.savefig(file, dpi=150)
    except (ValueError, OverflowError) as error:
        raise LogitcaskError(
            f"{file}: cannot be drawn: {shown_reason(error)}: leave out the run that diverged"
        ) from error
    return drawn


def _style(number: int) -> dict[str, Any]:
    """Return colour and marker of a run; those of the ninth differ from the first's in the marker."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)]}


def _draw_run(axes: "Axes", lines: Sequence[Line], name: str, number: int, *, by_tokens: bool) -> int:
    """Draw one quantity of one run, in training and of held-out examples, and return the number of curves."""
    places, style, drawn = _tokens(lines) if by_tokens else {}, _style(number), 0
    for prefix, how in (("", TRAINING), ("eval_", HELD_OUT)):
        steps, values = curve(lines, prefix + name)
        if not any(values):
            continue
        x: Sequence[float] = [places[step] for step in steps] if by_tokens else steps
        if prefix:
            axes.plot(x, values, **{**style, **how})
        else:
            axes.plot(*_fewer(x, values), **{**style, **how, "marker": "." if len(x) == 1 else ""})
        drawn += 1
    return drawn


def _tokens(lines: Sequence[Line]) -> dict[int, float]:
    """Return the tokens trained on before each step of a log; between lines of training they grow evenly."""
    total, known = 0.0, {0: 0.0}
    for line in lines:
        total += line.get("tokens") or 0.0
        if line.get("tokens"):
            known[int(line["step"] or 0)] = total
    steps = sorted({int(line["step"] or 0) for line in lines})
    at = np.interp(steps, list(known), list(known.values()))
    return dict(zip(steps, at.tolist(), strict=True))


def _fewer(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return a curve of at most ``POINTS`` points, means of neighbours."""
    if len(x) <= POINTS:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), POINTS)
    return [float(np.mean(np.take(x, part))) for part in parts], [float(np.mean(np.take(y, part))) for part in parts]


def _draw_teachers(axes: "Axes", logs: Mapping[str, Sequence[Line]], name: str) -> None:
    """Draw the teacher's own value on the held-out examples; in the colours of the runs if it differs among them."""
    values = [curve(lines, f"eval_teacher_{name}")[1][-1:] for lines in logs.values()]
    distinct = {round(value, 4) for known in values for value in known}
    for number, known in enumerate(values):
        if known:
            color = GRAY if len(distinct) == 1 else _style(number)["color"]
            axes.axhline(known[0], color=color, **TEACHER)


def _set_ticks(axes: "Axes", *, by_tokens: bool, by_decades: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    if by_tokens:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if by_decades:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", names: Sequence[str]) -> None:
    """Put the legend below the panels: the runs, then what the kinds of lines are."""
    from matplotlib.lines import Line2D

    runs = [Line2D([], [], **_style(number), label=name) for number, name in enumerate(names)]
    kinds = [
        Line2D([], [], color=GRAY, **TRAINING, label="training"),
        Line2D([], [], color=GRAY, marker="o", **HELD_OUT, label="held out"),
    ]
    if any(line.get_linestyle() == ":" for axes in figure.axes for line in axes.lines):
        kinds.append(Line2D([], [], color=GRAY, **TEACHER, label="teacher, held out"))
    columns = max(1, min(4, 110 // (max(map(len, names)) + 8)))
    figure.legend(handles=[*runs, *kinds], loc="outside lower center", ncols=columns)
