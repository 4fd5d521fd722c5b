"""Finished runs side by side, as a Markdown table or as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.report.plot import require_plot
from logitcask.pipeline.runs.curves import draw_curves
from logitcask.pipeline.runs.run_folder import Run, read_run, run_names
from logitcask.pipeline.runs.table import LOSSES, differing, effort, last, table


def compare(paths: Sequence[Path], output: Path | None, plot: Path | None, *, as_json: bool) -> str:
    """Compare runs, plot their curves to ``plot``, write Markdown to ``output`` and return what to print.

    Raises LogitcaskError if a run is missing or damaged, or a file could not be written.
    """
    names = run_names(paths)
    if plot is not None:
        require_plot(plot)
    if output is not None and not output.parent.is_dir():
        raise LogitcaskError(f"--output {output}: there is no folder {output.parent}: create it first")
    runs = [read_run(path) for path in paths]
    if plot is not None:
        draw_curves({name: run.log for name, run in zip(names, runs, strict=True)}, plot, by_tokens=True)
    text = markdown(names, runs)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    return json.dumps(as_records(names, runs), indent=2) if as_json else text


def as_records(names: Sequence[str], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each run's figures for JSON; losses are in nats."""
    keys = differing(runs)
    return [
        {
            "run": name,
            "path": str(run.path),
            "settings": {key: run.settings.get(key) for key in keys},
            **effort(run),
            "training": {key: last(run, key) for key in LOSSES},
            "before": run.before,
            "after": run.after,
            "best": run.best,
            "evaluation": run.evaluation.model_dump(mode="json") if run.evaluation else None,
        }
        for name, run in zip(names, runs, strict=True)
    ]


def markdown(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the table as Markdown."""
    head, *body = table(names, runs)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
