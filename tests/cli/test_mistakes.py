"""A mistake is three lines: what, how to fix it, where to read more; the parser's too. What people type is known."""

import re
import sys
from pathlib import Path

import pytest
import typer

from logitcask.pipeline.cli import app, main
from logitcask.pipeline.mistakes import SECTIONS, SYNONYMS, error_lines, meant, section_of
from tests.project.reference import commands

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
OPTIONS = {
    name: {flag for parameter in command.params for flag in parameter.opts}
    for name, command in commands(typer.main.get_command(app))
}


def anchor(heading: str) -> str:
    """Return the anchor that MyST gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace(" ", "-"))


def test_every_section_of_the_page_of_errors_is_named_by_its_messages() -> None:
    sections = re.findall(r"\n### (.+)\n\n```text\n(.+)\n```\n", PAGE.read_text())
    assert {anchor(heading) for heading, _ in sections} == SECTIONS.keys()
    for heading, message in sections:
        assert section_of(message) == anchor(heading), message


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("a: no such file: give the path of one", ["error: a: no such file", "fix:   give the path of one"]),
        ("--x needs y: pip install 'y', or leave it", ["error: --x needs y", "fix:   pip install 'y', or leave it"]),
        ("a: is b; use c: it is d", ["error: a: is b", "fix:   use c: it is d"]),
        (
            "2 bad records: 1 x has no template: use prompt: a 1; 1 x is empty: a 2; fix them, or skip them",
            [
                "error: 2 bad records: 1 x has no template: use prompt: a 1; 1 x is empty: a 2",
                "fix:   fix them, or skip them",
            ],
        ),
        ("a: must be b, got 'c: use d'", ["error: a: must be b, got 'c: use d'"]),
        ("--x 'a': use b, not 'c'", ["error: --x 'a'", "fix:   use b, not 'c'"]),
        ("the users' file's end (x: try y): give it", ["error: the users' file's end (x: try y)", "fix:   give it"]),
        (
            "memory ran out; lower a: half of b; c; then run it",
            ["error: memory ran out", "fix:   lower a: half of b; c; then run it"],
        ),
        ("two\nlines", ["error: two lines"]),
        (
            "c: another run is writing this cache: wait for it or stop it",
            [
                "error: c: another run is writing this cache",
                "fix:   wait for it or stop it",
                "see:   docs/reference/errors.md#two-runs-on-one-cache",
            ],
        ),
    ],
)
def test_a_message_becomes_lines(message: str, lines: list[str]) -> None:
    assert error_lines(message, "").splitlines() == lines
    assert len(error_lines(message, "logitcask train").splitlines()) == min(3, len(lines) + 1)


def test_what_is_typed_stands_for_options_that_exist() -> None:
    known = set().union(*OPTIONS.values())
    for typed, options in SYNONYMS.items():
        assert set(options) <= known, typed
        assert any(meant(typed, flags) and typed not in flags for flags in OPTIONS.values()), typed


@pytest.mark.parametrize(
    ("words", "what", "fix", "more"),
    [
        ("train --lr 3", "no such option --lr", "did you mean --learning-rate?", "logitcask train --help"),
        ("train --bf16", "no such option --bf16", "did you mean --use-mixed-precision?", "logitcask train --help"),
        ("train --max-length=9", "no such option --max-length", "did you mean --max-seq-length?", "train --help"),
        ("train --num-train-epochs 1", "no such option --num-train-epochs", "did you mean --epochs?", "train --help"),
        ("train --model m", "no such option --model", "did you mean --student-model or --teacher-model?", "--help"),
        ("precompute-logits --model m", "no such option --model", "did you mean --teacher-model?", "precompute-logits"),
        ("precompute-logits --bf16", "no such option --bf16", "did you mean --dtype?", "precompute-logits --help"),
        ("train --alhpa 1", "no such option --alhpa", "did you mean --alpha?", "logitcask train --help"),
        ("train --quiet", "--quiet is of all commands", "give it before the command: logitcask --quiet train", "train"),
        ("train --out r", "no such option --out", "did you mean --output-dir?", "logitcask train --help"),
        ("train --alpha", "--alpha has no value", "give it one", "logitcask train --help"),
        ("trian", "no such command trian", "did you mean train?", "logitcask --help"),
        ("cache inof", "no such command inof", "did you mean info?", "logitcask cache --help"),
        ("cache info", "PATH is missing", "give it", "logitcask cache info --help"),
    ],
)
def test_the_parsers_mistakes_have_the_same_form(
    words: str, what: str, fix: str, more: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["logitcask", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"error: {what}", f"fix:   {fix}"]
    assert lines[2].startswith("see:   logitcask ")
    assert lines[2].endswith(more) or more in lines[2]
    assert len(lines) == 3


def test_a_config_file_has_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lr: 1e-4\n")
    monkeypatch.setattr(sys, "argv", ["logitcask", "train", f"--config={config}"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f"error: {config}: unknown key lr\nfix:   did you mean learning_rate?\n"
