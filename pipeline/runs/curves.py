"""Plots of runs: losses and perplexity by step, of training and held-out examples. Needs the extra ``plot``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.cache.report.plot import require_plot
from logitcask.pipeline.runs.run_folder import Line, curve, read_log, run_names

PANELS = {  # logged quantity: title
    "total_loss": "total loss: alpha hard + (1 - alpha) soft",
    "hard_loss": "hard loss, nats",
    "soft_loss": "soft loss: T² times the divergence, nats",
    "perplexity": "perplexity",
}


def plot_runs(runs: Sequence[Path], file: Path) -> int:
    """Draw the curves of runs to a file and return their number. Raises LogitcaskError if a run cannot be read."""
    require_plot(file, "--output")
    logs = [read_log(run) for run in runs]
    return draw_curves(dict(zip(run_names(runs), logs, strict=True)), file)


def draw_curves(logs: Mapping[str, Sequence[Line]], file: Path, names: Sequence[str] = tuple(PANELS)) -> int:
    """Draw some of ``PANELS`` to a file, one colour per run, and return the number of curves.

    A soft loss that is 0 throughout, as of a run without soft labels, is omitted. Raises LogitcaskError if values are
    too large to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(6.0 * columns, 4.2 * rows), layout="constrained")
    drawn = 0
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        for number, (run, lines) in enumerate(logs.items()):
            for prefix, word, style in (("", "training", "-"), ("eval_", "held out", "o--")):
                steps, values = curve(lines, prefix + name)
                if any(values):
                    axes.plot(steps, values, style, color=f"C{number}", markersize=4, label=f"{run}, {word}")
                    drawn += 1
        axes.set(title=PANELS[name], xlabel="optimizer step", yscale="log" if name == "perplexity" else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=150)
    except (ValueError, OverflowError) as error:
        raise LogitcaskError(
            f"{file}: cannot be drawn: {shown_reason(error)}: leave out the run that diverged"
        ) from error
    return drawn
