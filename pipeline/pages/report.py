"""``logitcask compare --html``: settings, curves, figures and answers of runs in one file, to open or to mail."""

import base64
import html
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from logitcask.cache.report.plot import require_plot
from logitcask.pipeline.pages.page import fill, require_new
from logitcask.pipeline.runs.curves import PANELS, draw_curves
from logitcask.pipeline.runs.run_folder import FINAL, Run, read_run, run_names
from logitcask.pipeline.runs.table import table

Answer = Callable[[Path, str], str]  # of a student's folder to a prompt


def write_report(paths: Sequence[Path], file: Path, prompts: Sequence[str], answer: Answer, *, overwrite: bool) -> None:
    """Write the report of finished runs; each student answers each prompt.

    Raises LogitcaskError if a run is missing or damaged, matplotlib is missing, or the file cannot be written.
    """
    require_new(file, "--html", overwrite=overwrite)
    names, runs = run_names(paths), [read_run(path) for path in paths]
    sections = [
        _section("Results, and the settings that differ", _table(table(names, runs))),
        _section("Curves", _curves(names, runs)),
        *(_section(f"Answers to: {prompt}", _answers(names, runs, prompt, answer)) for prompt in prompts),
        _section("All settings", "".join(map(_settings, names, runs))),
    ]
    title = "Report of " + (f"the run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs")
    file.write_text(fill("report", {"TITLE": html.escape(title), "SECTIONS": "\n".join(sections)}), encoding="utf-8")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def _table(lines: Iterable[Sequence[str]]) -> str:
    """Return a table; the first line is its head, the first cell of the others names the row."""
    head, *body = ([html.escape(cell).replace("`", "") for cell in line] for line in lines)
    rows = ["".join([f'<th scope="row">{name}</th>', *(f"<td>{cell}</td>" for cell in cells)]) for name, *cells in body]
    return _markup(head, rows)


def _answers(names: Sequence[str], runs: Sequence[Run], prompt: str, answer: Answer) -> str:
    texts = [html.escape(answer(run.path / FINAL, prompt)) for run in runs]
    return _markup([html.escape(name) for name in names], ["".join(f"<td><pre>{text}</pre></td>" for text in texts)])


def _markup(head: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _curves(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the losses and perplexities of all runs as a picture that stands in the page."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "curves.svg")
        require_plot(file, "--html")
        draw_curves({name: run.log for name, run in zip(names, runs, strict=True)}, file, by_tokens=True)
        data = base64.b64encode(file.read_bytes()).decode()
    titles = "; ".join(title for title, _ in PANELS.values())
    words = f"Curves by tokens trained on, in training and on held-out examples: {titles}"
    return f'<img alt="{html.escape(words)}" src="data:image/svg+xml;base64,{data}">'


def _settings(name: str, run: Run) -> str:
    lines = [["setting", "value"], *([key, str(value)] for key, value in sorted(run.settings.items()))]
    return f"<details><summary>{html.escape(name)}</summary>{_table(lines)}</details>"
