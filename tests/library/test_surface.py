"""The public surface is frozen: names, signatures and docstrings.

``python -m tests.library.test_surface`` rewrites the file.
"""

import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib import pyplot
from nbconvert.preprocessors import ExecutePreprocessor

import logitcask as lc
from tests.library.notebook import NOTEBOOK, PAGE, parts
from tests.support.distilled import make_student, mixed_lengths
from tests.support.forked import ran
from tests.support.tiny import make_cache, make_tokenizer

SURFACE = Path(__file__).with_name("surface.json")
README = Path(__file__).parents[2] / "README.md"
TRAINERS = README.parent / "docs" / "guides" / "your-own-trainer.md"


def surface() -> dict[str, list[str]]:
    """Return the signature and docstring of every public name, and of its public members of our own."""
    found: dict[str, list[str]] = {}
    for name in lc.__all__:
        value = getattr(lc, name)
        members = {name: value}
        if inspect.isclass(value):
            own = {
                n: m for n, m in vars(value).items() if not n.startswith("_") and (callable(m) or hasattr(m, "fget"))
            }
            members |= {f"{name}.{n}": m for n, m in own.items()}
        for full, member in members.items():
            error = inspect.isclass(member) and issubclass(member, Exception)
            shown = "" if error or not callable(member) else str(inspect.signature(member))
            found[full] = [shown, inspect.getdoc(member) or ""]
    return found


def test_the_surface_is_as_it_was() -> None:
    assert surface() == json.loads(SURFACE.read_text())
    assert set(lc.__all__) == set(dir(lc))


def test_importing_takes_less_than_150_ms() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import logitcask; print(time.perf_counter() - t, len(sys.modules))"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", code]).split()[0]) for _ in range(3)]
    assert min(times) < 0.15


@pytest.mark.parametrize("name", ["trainer", "trl"])
def test_the_trainers_of_the_manual_are_the_examples(name: str) -> None:
    text = Path(__file__).with_name(f"example_{name}.py").read_text()
    made = text[text.index("    trainer = ") : text.index("    trainer.train()")].replace("  # fmt: skip", "")
    page = TRAINERS.read_text()
    assert textwrap.dedent(made) in page
    (bases,) = re.findall(r"^class CacheTrainer\((.*)\)", text, re.MULTILINE)
    assert f"({bases})" in page
    assert len(page.splitlines()) < 50


def test_the_readmes_loop_trains(tmp_path: Path) -> None:
    file = Path(__file__).with_name("example_loop.py")
    text = file.read_text()
    assert text[text.index("import sys") :] in README.read_text()
    caches = [make_cache(tmp_path), make_cache(tmp_path, tmp_path / "teacher", output=tmp_path / "other", seed=1)]
    run = ran(tmp_path, [tmp_path / "teacher", *caches], [{}], module=str(file))
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) >= 3


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook, with the cache and the student that it reads."""
    monkeypatch.setenv("CACHE", str(mixed_lengths(tmp_path)))
    monkeypatch.setenv("STUDENT", str(tmp_path / "student"))
    make_student().save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    return notebook


def test_the_notebooks_cells_run_and_plot(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pyplot.close("all")
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    exec("\n".join(cells), {})  # noqa: S102 -- ours; a kernel would import all of it anew
    assert pyplot.get_fignums()
    pyplot.close("all")
    assert "of the teacher's mass" in capsys.readouterr().out


@pytest.mark.nightly  # in small: the test above
def test_the_notebook_runs_and_shows_its_plot(notebook: Any, tmp_path: Path) -> None:
    done, _ = ExecutePreprocessor(timeout=120).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("of the teacher's mass" in output.get("text", "") for output in outputs)


def test_the_page_of_the_manual_shows_the_notebook() -> None:
    shown = re.sub(r"```text\n.*?```\n\n|!\[.*?\n\n?", "", PAGE.read_text() + "\n", flags=re.DOTALL)
    assert shown.split() == "\n\n".join(parts(nbformat.read(NOTEBOOK, as_version=4))).split()


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
