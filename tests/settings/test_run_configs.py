"""Every file of configs/runs loads and can be planned, laptop-cpu trains, and an interrupted sweep resumes."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from logitcask.pipeline.cli import app
from logitcask.pipeline.plan.plan import make_plan
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.train import run_training
from tests.support.runs import STUDENT, losses, write_config
from tests.support.tiny import make_cache

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "configs" / "runs"
FILES = sorted(RUNS.glob("*.yaml"))
GUIDE = [file for file in FILES if file.stem.startswith("guide-")]
TYPES, SIZES = ("output", "logit", "hybrid"), ("100m", "350m", "1b")


@pytest.mark.parametrize("file", [file for file in FILES if file not in GUIDE], ids=lambda file: file.stem)
def test_every_file_is_valid_and_states_its_students_memory(file: Path, tmp_path: Path) -> None:
    settings = resolve(TrainSettings, file, {"cache": "c", "output_dir": str(tmp_path)})
    assert settings.student_config is not None
    shared = settings.model_dump(
        include={"batch_size", "use_mixed_precision", "use_gradient_checkpointing"}, exclude_none=True
    )
    device = "2-core-CPU" if settings.device == "cpu" else "L4"
    fixed = {"tokens": 1_000_000, "teacher_model": "135M", "device": device}
    plan = make_plan(PlanSettings.model_validate({**shared, **fixed, "student_config": str(settings.student_config)}))
    stated = re.search(r"([\d.]+) GB by\n# `logitcask plan ", file.read_text())
    assert (stated is None) == (file.stem == "hybrid-tiny")
    if stated is not None:
        assert float(stated[1]) == round(sum(plan.student_memory.values()) / 1e9, 2)
        assert plan.student_fits


@pytest.mark.parametrize("size", SIZES)
def test_the_approaches_differ_only_in_their_type(size: str) -> None:
    configs = {kind: yaml.safe_load((RUNS / f"{kind}-{size}.yaml").read_text()) for kind in TYPES}
    assert {kind: values.pop("distillation_type") for kind, values in configs.items()} == {kind: kind for kind in TYPES}
    assert configs["output"] == configs["logit"] == configs["hybrid"]


def test_the_laptop_configs_exist() -> None:
    assert {"laptop-cpu", "laptop-mps", "laptop-8gb-gpu"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", GUIDE, ids=lambda file: file.stem)
def test_the_guides_own_settings_train(file: Path, tmp_path: Path) -> None:
    flags = {"cache": str(make_cache(tmp_path)), "output_dir": str(tmp_path / "run"), "max_steps": 1, "device": "cpu",
             "student_config": str(write_config(tmp_path / "student.json", STUDENT)), "logging_steps": 1}  # fmt: skip
    settings = resolve(TrainSettings, file, flags)
    kind = file.stem.removeprefix("guide-")
    assert (settings.distillation_type, settings.temperature, settings.learning_rate) == (kind, 2.0, 1e-4)
    assert (settings.use_gradient_checkpointing, settings.use_mixed_precision) == (True, True)
    assert (settings.alphas.last, settings.save_steps) == ({"output": 1.0, "logit": 0.0, "hybrid": 0.5}[kind], 1000)
    run_training(settings)
    assert len(losses(tmp_path / "run")) == 1


def test_laptop_cpu_trains_a_step(tmp_path: Path) -> None:
    flags = {"cache": str(make_cache(tmp_path)), "output_dir": str(tmp_path / "run"), "max_steps": 1,
             "student_config": str(write_config(tmp_path / "student.json", STUDENT)), "logging_steps": 1}  # fmt: skip
    run_training(resolve(TrainSettings, RUNS / "laptop-cpu.yaml", flags))
    assert len(losses(tmp_path / "run")) == 1


# A stand-in for the command: it records its arguments. Like a real run, train needs an empty folder or
# --resume-from-checkpoint, and leaves a checkpoint and metrics, or dies in its first save.
LOGITCASK = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> commands
[[ $1 == train ]] || exit 0
while [[ $1 != --output-dir ]]; do shift; done
[[ ! -e $2/checkpoint-20 || $* == *" --resume-from-checkpoint latest "* ]] || exit 2
mkdir -p "$2/checkpoint-20"
[[ $2 != *"$DYING" ]] || exit 130
touch "$2/checkpoint-20/settings.json" "$2/metrics.json"
"""


def sweep(folder: Path, dying: str) -> tuple[int, list[list[str]]]:
    """Return the exit code of a sweep in which one run is killed, and the arguments of each command it ran."""
    (folder / "commands").unlink(missing_ok=True)
    (folder / "logitcask").write_text(LOGITCASK)
    (folder / "logitcask").chmod(0o755)
    words = ["bash", str(ROOT / "configs" / "sweep.sh"), "cache", "sweep", "--max-steps", "40"]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "DYING": dying}
    code = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    return code, [line.split() for line in (folder / "commands").read_text().splitlines()]


def settings_of(words: list[str]) -> TrainSettings:
    """Return the settings that ``logitcask train`` makes from its arguments."""
    command: Any = typer.main.get_command(app)
    given = command.commands["train"].make_context("train", words).params
    config = given.pop("config")
    return resolve(TrainSettings, config, {name: value for name, value in given.items() if value not in (None, ())})


def test_a_sweep_skips_what_is_finished_and_resumes_what_was_interrupted(tmp_path: Path) -> None:
    code, began = sweep(tmp_path, dying="hybrid-T1")
    assert code == 130
    runs = [settings_of(words[1:]) for words in began]
    assert [run.output_dir.name for run in runs] == ["output", "logit-T1", "hybrid-T1"]
    assert [(run.distillation_type, run.alphas.last, run.temperature, run.max_steps) for run in runs] == [
        ("output", 1.0, 2.0, 40),
        ("logit", 0.0, 1.0, 40),
        ("hybrid", 0.5, 1.0, 40),
    ]
    _, (again, _) = sweep(tmp_path, dying="hybrid-T2")
    assert settings_of(again[1:]).output_dir.name == "hybrid-T1"
    assert settings_of(again[1:]).resume_from_checkpoint is None  # its checkpoint was incomplete
    (tmp_path / "sweep" / "hybrid-T2" / "checkpoint-20" / "settings.json").touch()
    code, (resumed, compared) = sweep(tmp_path, dying="nothing")
    assert code == 0
    assert settings_of(resumed[1:]).resume_from_checkpoint == "latest"
    assert compared[:5] == ["compare", *(f"sweep/{name}" for name in ("output", "logit-T1", "hybrid-T1", "hybrid-T2"))]
    assert compared[5:] == ["--output", "sweep/comparison.md", "--plot", "sweep/curves.png"]
    assert sweep(tmp_path, dying="nothing") == (0, [compared])
