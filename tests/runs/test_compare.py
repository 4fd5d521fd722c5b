"""logitcask compare: two real runs side by side, and which input is refused in one line."""

import base64
import json
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from logitcask.pipeline.cli import main
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.models.generate import answer
from logitcask.pipeline.runs.run_folder import read_log
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from tests.support.mistakes import said
from tests.support.runs import STUDENT, metrics, train, write_config
from tests.support.tiny import make_cache

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A hybrid run that watched for its best step and was evaluated, and a run on the text alone."""
    folder = tmp_path_factory.mktemp("runs")
    cache = make_cache(folder)
    one = train(cache, folder / "one", max_steps=4, eval_steps=2, load_best=True, student_config=student(folder))
    two = train(cache, folder / "two", max_steps=3, distillation_type="output", student_config=student(folder))
    values = {"model": str(one / "final"), "cache": str(cache), "device": "cpu", "output": one / "evaluation.json"}
    evaluate(EvaluateSettings.model_validate(values))
    return one, two


def held_out(evaluation: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in evaluation.items() if name.startswith("eval_")}


def student(folder: Path) -> Path:
    return write_config(folder / "student.json", STUDENT)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns its exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["logitcask", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_json_has_the_runs_own_figures(runs: tuple[Path, Path], run: Run) -> None:
    code, out, _ = run(*runs, "--json")
    assert code == 0
    records = json.loads(out)
    assert [one["run"] for one in records] == ["one", "two"]
    others = {"alpha": 1.0, "distillation_type": "output", "eval_steps": None, "load_best": False, "max_steps": 3}
    assert [set(one["settings"]) for one in records] == [set(others)] * 2
    assert records[1]["settings"] == others
    for one, folder in zip(records, runs, strict=True):
        log, ends = read_log(folder), metrics(folder)
        training = [line for line in log if "tokens" in line]
        assert one["before"] == held_out(ends["before"])
        assert one["after"] == held_out(ends["after"])
        assert one["steps"] == len(training)
        assert one["tokens"] == sum(line["tokens"] or 0 for line in training)
        assert one["seconds"] == log[-1]["seconds"]
        assert one["peak_memory_mb"] == max(line["peak_memory_mb"] or 0 for line in log)
        assert one["training"]["total_loss"] == training[-1]["total_loss"]
        speeds = [line["tokens_per_second"] or 0 for line in training]
        assert min(speeds) <= one["tokens_per_second"] <= max(speeds)
    assert (records[0]["best"], records[1]["best"]) == (metrics(runs[0])["best"], None)
    assert records[0]["evaluation"] == json.loads((runs[0] / "evaluation.json").read_text())
    assert records[1]["evaluation"] is None


def test_markdown_is_a_table(runs: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    output, plot = tmp_path / "table.md", tmp_path / "curves.png"
    code, out, _ = run(*runs, "--output", output, "--plot", plot)
    assert code == 0
    assert output.read_text() == out
    assert plot.read_bytes()[:4] == b"\x89PNG"
    lines = out.splitlines()
    assert lines[0] == "|  | one | two |"
    assert lines[1] == "| --- | --- | --- |"
    assert all(line.count("|") == 4 for line in lines)
    assert "| `distillation_type` | hybrid | output |" in lines
    assert "| `alpha` | 0.1 | 1.0 |" in lines  # as the approach has it
    assert "| steps | 4 | 3 |" in lines
    before, after = (f"{metrics(runs[0])[end]['eval_perplexity']:,.4g}" for end in ("before", "after"))
    assert f"| held out: perplexity, before → after | {before} → {after} |" in out
    best = metrics(runs[0])["best"]
    loss = f"{best['eval_total_loss']:,.4g}"
    assert f"| held out: total loss, best | {loss} at step {best['step']}, which final/ is |  |" in lines
    assert any(line.startswith("| evaluation: KL to the teacher at T=2") and line.endswith("|  |") for line in lines)


def test_the_soft_loss_is_named_by_its_divergence(runs: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    other = shutil.copytree(runs[0], tmp_path / "other")
    settings = json.loads((other / "final" / "settings.json").read_text())
    assert "held out: soft loss, T² KL, nats, before" in run(*runs)[1]
    (other / "final" / "settings.json").write_text(json.dumps({**settings, "divergence": "jsd", "tail": "bucket"}))
    assert "held out: soft loss, T² JSD (tail bucket), nats, before" in run(other)[1]
    assert "held out: soft loss, T² divergence, nats, before" in run(runs[0], other)[1]


def test_a_bar_in_a_setting_does_not_break_the_table(runs: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    other = shutil.copytree(runs[1], tmp_path / "other")
    settings = json.loads((other / "final" / "settings.json").read_text())
    (other / "final" / "settings.json").write_text(json.dumps({**settings, "wandb_run_name": "p|q"}))
    assert "| `wandb_run_name` | not set | p\\|q |" in run(runs[1], other)[1]


def test_an_evaluation_without_a_cache_is_shown(runs: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    other = shutil.copytree(runs[1], tmp_path / "other")
    humaneval = {
        "problems": 164, "samples": 20, "temperature": 0.8, "prompting": "chat", "stopped": 2, "without_room": 0,
        "pass_rates": [{"k": 10, "rate": 0.25, "standard_error": 0.034}], "isolation": "namespaces",
    }  # fmt: skip
    task = {"task": "t", "metric": "acc", "value": 0.5, "standard_error": None, "examples": 1000}
    evaluation = {"model": "m", "on_cache": None, "humaneval": humaneval, "tasks": [task]}
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    lines = run(runs[1], other)[1].splitlines()
    assert "| evaluation: HumanEval pass@10, 164 problems, 20 samples at T=0.8, chat |  | 0.2500 ± 0.0340 |" in lines
    assert "| evaluation: HumanEval programs stopped by the sandbox |  | 2 |" in lines
    assert "| evaluation: t, acc, 1,000 examples |  | 0.5000 |" in lines
    assert not any("too long" in line or "evaluated on" in line for line in lines)


def test_a_resumed_run_takes_its_first_evaluation_from_its_log(
    runs: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    other = shutil.copytree(runs[0], tmp_path / "resumed")
    ends = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps({**ends, "before": None}))
    assert json.loads(run(other, "--json")[1])[0]["before"] == held_out(ends["before"])


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "metrics.jsonl: missing: not the folder of a run"),
        (remove("metrics.jsonl"), "metrics.jsonl: missing"),
        (remove("final/settings.json"), "settings.json: missing"),
        (remove("metrics.json"), "metrics.json: missing"),
        (write("final/settings.json", "[]"), "settings.json: damaged: must be a JSON object"),
        (write("final/settings.json", "{"), "settings.json: damaged"),
        (write("metrics.json", '{"before": null, "after": 3}'), "metrics.json: damaged"),
        (write("metrics.json", '{"after": {"x": "y"}}'), "metrics.json: damaged"),
        (write("metrics.json", '{"after": {}, "best": {"step": 2}}'), "metrics.json: damaged"),
        (write("metrics.jsonl", "x\n"), "metrics.jsonl: line 1 is damaged"),
        (write("evaluation.json", '{"model": "m"}'), "evaluation.json: not an evaluation (Field required)"),
        (write("evaluation.json", "{"), "evaluation.json: not an evaluation"),
    ],
)
def test_a_damaged_run_is_one_line(
    damage: Callable[[Path], Any], message: str, runs: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    damaged = shutil.copytree(runs[0], tmp_path / "damaged")
    damage(damaged)
    code, _, err = run(runs[0], damaged)
    assert code == 2
    assert message in said(err)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--plot", "x.doc"], "--plot must end in .png"), (["--output", "none/x.md"], "there is no folder none")],
)
def test_files_that_cannot_be_written_are_refused_first(
    words: list[str], message: str, runs: tuple[Path, Path], run: Run
) -> None:
    code, out, err = run(*runs, *words)
    assert (code, out) == (2, "")
    assert message in err


class Page(HTMLParser):
    """The texts of a page, and the names of its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.names: set[str] = set()
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_report_holds_results_settings_curves_and_answers(
    runs: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    file, prompt = tmp_path / "report.html", "<script>alert(1)</script> How many?"
    code, out, err = run(*runs, "--html", file, "--prompt", prompt)
    assert (code, err) == (0, "")
    page = Page(file.read_text())
    assert "script" not in page.names
    assert f"Answers to: {prompt}" in page.texts
    for line in out.splitlines()[2:]:  # the table that is printed
        for cell in line.strip("| ").split(" | "):
            assert cell.strip().strip("`") in page.texts
    assert answer(runs[0] / "final", prompt) in page.texts
    assert "learning_rate" in page.texts
    (picture,) = page.sources
    assert b"<svg" in base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,"))
    for words, line in (
        ((*runs, "--html", file), "exists\nfix:   name another file, or give --overwrite"),
        ((*runs, "--prompt", "x"), "--prompt and --overwrite apply to --html"),
        ((*runs, "--html", tmp_path / "none" / "a.html"), "there is no folder"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert line in err
    assert run(*runs, "--html", file, "--overwrite")[0] == 0
