"""SE-KD3X's setting, configs/runs/sekd: the commands of its script, and that they end in scores, with tiny Qwen3s."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import Qwen3Config, Qwen3ForCausalLM

from logitcask.pipeline.cli import app
from tests.support.tiny import RECORDS, make_tokenizer, write_jsonl

SCRIPT = Path(__file__).parents[2] / "configs" / "runs" / "sekd" / "run.sh"
# Stand-ins: they record what they are given, which then runs in this process.
LOGITCASK = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> commands
"""
PYTHON = """#!/usr/bin/env bash
cat > program.py
shift
printf '%s\\n' "$@" > arguments
"""


def make_qwen3(folder: Path, seed: int) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(
        vocab_size=300, **sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recorded(folder: Path, *options: str) -> list[list[str]]:
    """Return the arguments of each command that the script runs."""
    for name, text in (("logitcask", LOGITCASK), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "commands").write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TEACHER": "teacher", "STUDENT": "student",
                   "DATA": "texts.jsonl", "TOKENS": "300", "HELD_OUT": "4", "SEEDS": "0", "TASKS": ""}  # fmt: skip
    subprocess.run(
        ["bash", SCRIPT, "out", *options], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True
    )
    return [line.split() for line in (folder / "commands").read_text().splitlines()]


def test_from_text_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_qwen3(tmp_path / "teacher", 0)
    make_qwen3(tmp_path / "student", 1)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{r['prompt']}{r['response']}"} for r in RECORDS])
    commands = recorded(tmp_path, "--max-steps", "2", "--device", "cpu")
    kinds = ["plan", *["precompute-logits"] * 2, *["evaluate"] * 2, *["train", "evaluate"] * 2, "compare"]
    assert [words[0] for words in commands] == kinds
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["-", *(tmp_path / "arguments").read_text().split("\n")[:-1]])
        exec((tmp_path / "program.py").read_text(), {})  # noqa: S102
    assert len((tmp_path / "out/test.jsonl").read_text().splitlines()) == 4
    assert 5 < len((tmp_path / "out/train.jsonl").read_text().splitlines()) < 20
    command: Any = typer.main.get_command(app)
    for words in commands:
        command(words, standalone_mode=False)
    scores = {
        name: json.loads((tmp_path / f"out/{name}").read_text()) for name in ("teacher.json", "all-0/scores.json")
    }
    assert all("cache" in str(score) for score in scores.values())
    settings = json.loads((tmp_path / "out/selected-0/final/settings.json").read_text())
    wanted = {"learning_rate": 1e-5, "temperature": 1.0, "distillation_type": "logit", "select": "entropy:0.2"}
    assert {name: settings[name] for name in wanted} == wanted
    assert "all-0" in (tmp_path / "out/comparison.md").read_text()
    again = [words[0] for words in recorded(tmp_path)]
    assert again == ["plan", *["precompute-logits"] * 2, "compare"], "what is finished is skipped"


def test_the_script_states_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    header = SCRIPT.read_text().split("set -euo")[0].replace("\n# ", " ")
    found = re.search(r"`logitcask (plan [^`]+)`, on one H100: ([\d.]+ GB) of cache, ([\d.]+ min)", header)
    assert found is not None
    command: Any = typer.main.get_command(app)
    command(found[1].split(), standalone_mode=False)
    printed = capsys.readouterr().out
    assert f"│ {found[2]} in " in printed
    assert f"│ {found[3]} at " in printed
