"""A plot of a cache's labels: mass by rank, and the teacher's entropy. Needs the extra ``plot``."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.report.label_figures import LabelFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")


def require_plot(file: Path, option: str = "--plot") -> None:
    """Raise LogitcaskError if a plot could not be saved: unknown file type, no folder or no matplotlib."""
    if file.suffix.lower() not in FORMATS:
        raise LogitcaskError(f"{option} must end in {', '.join(FORMATS)}, got {file.name!r}")
    if not file.parent.is_dir():
        raise LogitcaskError(f"{option} {file}: there is no folder {file.parent}: make it first")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise LogitcaskError("plots need matplotlib: pip install 'logitcask[plot]'") from error


def plot_labels(labels: LabelFigures, title: str, file: Path) -> None:
    """Plot mass by rank (left) and entropies (right) to a file. Raises LogitcaskError if it cannot be saved."""
    require_plot(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(f"{title}: {labels.positions:,} target positions of {labels.examples:,} examples")
    left, right = figure.subplots(1, 2)
    _mass_by_rank(left, labels)
    _entropies(right, labels)
    figure.savefig(file, dpi=150)


def _mass_by_rank(axes: "Axes", labels: LabelFigures) -> None:
    """Plot the cumulative mass of the head; the legend gives the tail's."""
    from matplotlib.ticker import MaxNLocator

    ranks = np.arange(1, len(labels.captured_by_rank[0]) + 1)
    for temperature, mass, head in zip(labels.temperatures, labels.captured_by_rank, labels.captured_mass, strict=True):
        name = f"T={temperature:g}: head {head:.1%}, tail {1 - head:.1%}"
        axes.plot(ranks, mass, marker="o", markersize=4, label=name)
    axes.set(
        title="Mass captured by the head",
        xlabel="rank of the token (1 = most probable)",
        ylabel="cumulative share of the teacher's mass",
        ylim=(0, 1.02),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _entropies(axes: "Axes", labels: LabelFigures) -> None:
    """Plot the share of positions by entropy, up to the last bin that holds any."""
    edges, counts = np.array(labels.entropy_edges), np.array(labels.entropy_counts)
    for temperature, row, mean in zip(labels.temperatures, counts, labels.entropy, strict=True):
        axes.stairs(row / row.sum(), edges, fill=True, alpha=0.35)
        axes.stairs(row / row.sum(), edges, linewidth=1.3, color=f"C{labels.temperatures.index(temperature)}",
                    label=f"T={temperature:g}: mean {mean:.2f} nats")  # fmt: skip
    last = int(np.flatnonzero(counts.sum(0))[-1])
    axes.set(
        title="Entropy of the teacher" + (" (lower bound)" if labels.entropy_is_bound else ", estimated per position"),
        xlabel="nats; the last bin holds all higher values",
        ylabel="share of target positions",
        xlim=(0, float(edges[last + 1])),
    )
    axes.grid(alpha=0.3)
    axes.legend()
