"""The README and the manual are correct: snippets, commands, messages."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.cache.labels import soft_labels
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cache_cli import cache_app
from logitcask.pipeline.cli import app, main
from tests.support.tiny import make_cache, make_teacher

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
PLAN = DOCS / "guides" / "plan.md"
FORMAT = DOCS / "reference" / "cache-format.md"


def test_the_decoding_snippet_gives_the_weights_training_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    snippet = re.findall(r"```python\n(.*?)```", FORMAT.read_text(), re.DOTALL)[0]
    variables: dict[str, Any] = {}
    exec(snippet, variables)  # noqa: S102
    reader = CacheReader(cache)
    want = soft_labels(reader.shard(0).targets[:1], reader.manifest.label.temperatures, 2.0, "sampled")
    used = want.weights[0] > 0
    np.testing.assert_array_equal(variables["ids"], want.ids[0][used])
    np.testing.assert_allclose(variables["weights"], want.weights[0][used], rtol=1e-4)


def test_labels_from_an_own_forward_pass_become_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the specification shows it, with texts that the teacher wrote, as labels must fit their text."""
    monkeypatch.chdir(tmp_path)
    teacher = make_teacher(tmp_path / "teacher")
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(0)
    start = tokenizer("How many", return_tensors="pt")["input_ids"].repeat(40, 1)
    strange = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()]  # bytes that are no text alone
    written = model.generate(
        start, do_sample=True, top_k=0, max_new_tokens=30, suppress_tokens=[*strange, 0], pad_token_id=0
    )
    texts = tokenizer.batch_decode(written)
    snippet, command = re.findall(r"```python\n(.*?)```\n\n```sh\n(.*?)\n```", FORMAT.read_text(), re.DOTALL)[-1]
    exec(snippet[snippet.rindex("import json") :], {"teacher": str(teacher), "texts": texts})  # noqa: S102
    monkeypatch.setattr(sys, "argv", command.replace("TEACHER", str(teacher)).split())
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert CacheReader(tmp_path / "data" / "cache").manifest.label.unknown is None


def test_links_to_files_lead_somewhere() -> None:
    for page in (README, *DOCS.rglob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        assert "docs/reference/cache-format.md" in links or page != README
        assert not [link for link in links if not (page.parent / link).exists()], page


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text()
    names = [command.name for command in app.registered_commands]
    nested = [command.name for command in cache_app.registered_commands]
    for name in [*names, *(f"cache {inner}" for inner in nested)]:
        assert f"logitcask {name}" in text, name


@pytest.mark.parametrize("tables", [False, True])
def test_the_plan_prints_what_its_page_shows(
    tables: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = dict(re.findall(r"```\n\$ (logitcask plan .*)\n((?s:.*?))\n```", PLAN.read_text()))
    (command,) = (command for command in shown if tables == ("--tables" in command))
    monkeypatch.chdir(README.parent)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown[command].splitlines()


def source_texts() -> set[str]:
    """Return every string in the source, with an ellipsis for each part that varies."""
    texts = set()
    for file in [*(README.parent / "cache").rglob("*.py"), *(README.parent / "pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.add(re.sub("…+", "…", "".join(parts)))
    return texts


def test_the_messages_of_the_page_of_errors_are_the_programs() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    messages = re.findall(r"\n### .+\n\n```text\n(.+)\n```\n\n\S", page)
    texts = source_texts()
    assert len(messages) == page.count("\n### ") > 25
    for message in messages:
        assert any(message in text for text in texts), message


def test_ci_runs_the_readmes_test_command() -> None:
    """In its two halves, between which it waits for what it installs beside them."""
    script, recipes = ((README.parent / name).read_text() for name in (".ci/run", "justfile"))
    for step in ("-m venv .venv", ".venv/bin/pip install", "rust-just", ".venv/bin/just"):
        assert step in script
        assert step in README.read_text()
    assert ".venv/bin/just test" in README.read_text()
    assert "\ntest: setup check\n" in recipes
    assert script.endswith(".venv/bin/just setup\nwait\n.venv/bin/just check\n")


def test_the_recipes_parse() -> None:
    just = Path(sys.executable).parent / "just"
    listed = subprocess.run([just, "--list"], cwd=README.parent, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    for recipe in (
        "setup",
        "demo",
        "sweep",
        "test",
        "lint",
        "docs",
        "precompute",
        "train",
        "cache-info",
        "bench",
        "clean",
    ):
        assert recipe in listed.stdout
