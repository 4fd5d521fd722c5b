"""What the README says is so: its decoding snippet, its commands."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.reader import CacheReader
from cache.soft_labels import soft_labels
from pipeline.cli import app, cache_app, main
from tests.tiny import make_cache

README = Path(__file__).parent.parent / "README.md"


def test_the_decoding_snippet_gives_the_weights_training_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert snippet is not None
    found: dict[str, Any] = {}
    exec(snippet.group(1), found)  # noqa: S102
    reader = CacheReader(cache)
    want = soft_labels(reader.shard(0).targets[:1], reader.manifest.label.temperatures, 2.0, "sampled")
    used = want.weights[0] > 0
    np.testing.assert_array_equal(found["ids"], want.ids[0][used])
    np.testing.assert_allclose(found["weights"], want.weights[0][used], rtol=1e-4)


def test_every_command_stands_in_the_readme() -> None:
    text = README.read_text()
    names = [command.name for command in app.registered_commands]
    nested = [command.name for command in cache_app.registered_commands]
    for name in [*names, *(f"cache {inner}" for inner in nested)]:
        assert f"logitcask {name}" in text, name


def test_the_plan_prints_what_the_readme_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.search(r"```\n\$ (logitcask plan .*)\n((?s:.*?))\n```", README.read_text())
    assert shown is not None
    monkeypatch.chdir(README.parent)
    monkeypatch.setattr(sys, "argv", shown.group(1).split())
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert capsys.readouterr().out.rstrip() == shown.group(2)


def test_ci_runs_the_readmes_test_command() -> None:
    script = (README.parent / ".ci" / "run").read_text()
    for step in ("-m venv .venv", ".venv/bin/pip install", "rust-just", ".venv/bin/just test"):
        assert step in script
        assert step in README.read_text()


def test_the_recipes_parse() -> None:
    just = Path(sys.executable).parent / "just"
    listed = subprocess.run([just, "--list"], cwd=README.parent, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    for recipe in ("setup", "demo", "test", "lint", "precompute", "train", "cache-info", "bench", "clean"):
        assert recipe in listed.stdout
