"""logitcask plot: which curves are drawn, and which input is refused in one line."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from logitcask.pipeline.cli import main
from logitcask.pipeline.runs.curves import draw_curves, plot_runs
from logitcask.pipeline.runs.run_folder import Line, curve, run_names
from tests.support.mistakes import said


def write_run(folder: Path, *, soft: float = 2.0, steps: int = 3) -> Path:
    """Create a run's folder with nothing but a log."""
    folder.mkdir(parents=True)
    names = {"total_loss": 1.5, "hard_loss": 1.0, "soft_loss": soft, "perplexity": 2.7}
    lines = [{"step": 0, **{f"eval_{name}": value + 1 if value else 0 for name, value in names.items()}}]
    lines += [{"step": step, **{name: value / step for name, value in names.items()}} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **named: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def plot(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["logitcask", "plot", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_each_panel_has_training_and_held_out_of_each_run(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", soft=0.0)]
    assert plot(monkeypatch, *runs, "--output", tmp_path / "x.png") == 0
    assert capsys.readouterr().out == f"14 curves of 2 runs -> {tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 2, 4]
    assert all(axes.get_ylabel() and axes.get_xlabel() == "optimizer step" for axes in figure.axes)
    assert in_legend(figure) == ["a", "b", "training", "held out"]
    training = figure.axes[1].lines[2]
    assert np.asarray(training.get_xdata()).tolist() == [1, 2, 3]
    assert np.asarray(training.get_ydata()).tolist() == [1.0, 0.5, 1.0 / 3]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "linear", "log"]


def in_legend(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_runs_are_compared_by_tokens_and_with_their_teacher(tmp_path: Path, drawn: list[Figure]) -> None:
    """The evaluation between two lines of training lies between them, too."""
    held: list[Line] = [
        {"step": s, "eval_hard_loss": 3.0 - s / 4, "eval_teacher_hard_loss": 1.25} for s in (0, 2, 3, 4)
    ]
    lines: list[Line] = [*held, {"step": 2, "hard_loss": 2.5, "tokens": 2}, {"step": 4, "hard_loss": 2.0, "tokens": 4}]
    assert draw_curves({"a": lines, "b": lines}, tmp_path / "a.svg", by_tokens=True) == 4
    hard = drawn[0].axes[1]
    assert hard.get_xlabel() == "tokens trained on"
    assert [np.asarray(line.get_xdata()).tolist() for line in hard.lines[:2]] == [[2, 6], [0, 2, 4, 6]]
    assert [np.asarray(line.get_ydata()).tolist() for line in hard.lines[4:]] == [[1.25, 1.25]] * 2
    assert in_legend(drawn[0])[-1] == "teacher, held out"
    draw_curves({"a": lines, "no tokens": held}, tmp_path / "b.svg", by_tokens=True)
    assert drawn[1].axes[1].get_xlabel() == "optimizer step"


def test_many_runs_look_different_and_long_logs_are_averaged(tmp_path: Path, drawn: list[Figure]) -> None:
    log: list[Line] = [{"step": s, "hard_loss": float(s % 2) + 1} for s in range(1, 1201)]
    assert draw_curves({f"run {n}": log for n in range(16)}, tmp_path / "a.svg", by_tokens=False) == 16
    (legend,) = drawn[0].legends
    handles = legend.get_lines()[:16]
    assert len({(line.get_color(), line.get_marker()) for line in handles}) == 16
    assert len({line.get_color() for line in handles[:8]}) == len({line.get_marker() for line in handles[:8]}) == 8
    first = drawn[0].axes[1].lines[0]
    assert np.asarray(first.get_ydata()).tolist() == [1.5] * 60
    assert np.asarray(first.get_xdata())[0] == 10.5  # the mean of steps 1 to 20


def test_the_last_line_of_a_step_counts_and_null_is_skipped() -> None:
    lines: list[Line] = [
        {"step": 2, "x": 1.0},
        {"step": 1, "x": 5.0},
        {"step": 2, "x": 3.0},
        {"step": 3, "x": None},
        {"step": 4},
    ]
    assert curve(lines, "x") == ([1, 2], [5.0, 3.0])


def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_a_run_without_log_lines_gives_an_empty_plot(tmp_path: Path) -> None:
    assert draw_curves({"a": []}, tmp_path / "a.png", by_tokens=True) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{0}/none"], "none/metrics.jsonl: missing: not the folder of a run"),
        (["{0}/a/metrics.jsonl"], "metrics.jsonl/metrics.jsonl: missing"),
        (["{0}/damaged"], "line 1 is damaged"),
        (["{0}/a", "{0}/a"], "given twice"),
        (["{0}/a", "--output", "{0}/x.doc"], "--output must end in .png"),
        (["{0}/a", "--output", "{0}/none/x.png"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a")
    (write_run(tmp_path / "damaged") / "metrics.jsonl").write_text("nonsense\n")
    assert plot(monkeypatch, *(word.format(tmp_path) for word in words)) == 2
    err = capsys.readouterr().err
    assert message in said(err)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(Exception, match=r"^plots need matplotlib: pip install 'logitcask\[plot\]'"):
        plot_runs([write_run(tmp_path / "a")], tmp_path / "a.png")
