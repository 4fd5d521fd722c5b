"""The rounds of configs/rounds.sh: which commands it runs, and that they train a tiny student on text of its own."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cli import app
from tests.support.runs import metrics
from tests.support.tiny import make_cache, make_teacher

ROOT = Path(__file__).parents[2]
# A stand-in for the command: it records its arguments, and leaves what a finished run leaves.
LOGITCASK = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> commands
[[ $1 == train ]] || exit 0
while [[ $1 != --output-dir ]]; do shift; done
mkdir -p "$2" && touch "$2/metrics.json"
"""
PROMPTS = """
languages: [python]
topics: [apples, bread, coffee, dates, eggs, figs, grapes, honey]
categories:
  counting: ["How many {topic} are {topic}?", "{topic} and more"]
"""


def rounds(folder: Path, count: int, *options: str) -> list[list[str]]:
    """Return the arguments of each command that the script runs for so many rounds."""
    (folder / "logitcask").write_text(LOGITCASK)
    (folder / "logitcask").chmod(0o755)
    (folder / "commands").write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "ROUNDS": str(count), "SHARE": "0.25",
                   "PROMPTS_PER_ROUND": "16", "NEW_TOKENS": "90"}  # fmt: skip
    words = [
        "bash",
        str(ROOT / "configs" / "rounds.sh"),
        "teacher",
        "cache",
        "student",
        "prompts.yaml",
        "out",
        *options,
    ]
    subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    return [line.split() for line in (folder / "commands").read_text().splitlines()]


def test_the_student_learns_from_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tail", "bucket", "--divergence", "reverse-kl", "--max-steps", "2", "--eval-fraction", "0.1",
               "--device", "cpu"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    first = rounds(tmp_path, 1, *options)
    assert [words[0] for words in first] == ["generate-data", "precompute-logits", "train"]
    again = rounds(tmp_path, 2, *options)
    assert [words[0] for words in again] == ["generate-data", "precompute-logits", "train"]
    assert (
        again[0][again[0].index("--model") + 1] == again[2][again[2].index("--student-model") + 1] == "out/1/run/final"
    )
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    make_cache(tmp_path)
    make_teacher(tmp_path / "student", seed=1)
    command: Any = typer.main.get_command(app)
    for words in (*first, *again):
        command(words, standalone_mode=False)
    for number in (1, 2):
        read = CacheReader(tmp_path / f"out/{number}/cache")
        assert 1 < len(read) <= 16
        after = metrics(tmp_path / f"out/{number}/run")
        assert after["after"]["eval_soft_loss"] < after["before"]["eval_soft_loss"]
    settings = (tmp_path / "out/2/run/final/settings.json").read_text()
    assert '"student_model": "out/1/run/final"' in settings
    assert "out/2/cache:0.25" in settings
