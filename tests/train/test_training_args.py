"""Any other field of the Trainer's own settings, and those that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.run_folder import read_log
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.arguments import training_arguments
from tests.support.runs import losses, train, train_settings

OTHERS = {"optim": "adafactor", "lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5, "adam_beta2": 0.95}


def test_they_reach_the_trainer_are_recorded_and_kept(cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    named = {**options, "max_steps": 4, "learning_rate": 1e-3, "training_args": OTHERS}
    run = train(cache, tmp_path / "run", **named)
    assert [line["learning_rate"] for line in read_log(run) if "learning_rate" in line] == [0.0, 5e-4, 1e-3, 1e-3]
    assert json.loads((run / "final/settings.json").read_text())["training_args"] == OTHERS
    again = tmp_path / "again"
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2")
    with pytest.raises(LogitcaskError, match=r"training_args: checkpoint has \{'adam_beta2': 0.95.*this run has \{\}"):
        train(cache, again, **{**named, "training_args": {}}, resume_from_checkpoint="latest")
    changed = {**OTHERS, "log_level": "error"}
    train(cache, again, **{**named, "training_args": changed}, resume_from_checkpoint="latest")
    assert losses(again) == losses(run)


def test_a_file_and_a_text_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: sgd\nadam_beta1: 0.8\n")
    (tmp_path / "a.json").write_text('{"optim": "sgd", "adam_beta1": 0.8}')
    for given in (str(tmp_path / "a.yaml"), str(tmp_path / "a.json"), (tmp_path / "a.json").read_text()):
        flags = {"cache": "c", "student_config": "tiny", "output_dir": "o", "training_args": given}
        settings = resolve(TrainSettings, None, flags)
        assert settings.training_args == {"optim": "sgd", "adam_beta1": 0.8}
        arguments = training_arguments(settings)
        assert (arguments.optim, arguments.adam_beta1, arguments.lr_scheduler_type) == ("sgd", 0.8, "cosine")


@pytest.mark.nightly  # in small: tests/train/test_wrappers.py
def test_compiled(cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """By the backend that needs no compiler."""
    runs = [
        train(cache, tmp_path / name, **{**options, "max_steps": 2}, **more)
        for name, more in {
            "plain": {},
            "compiled": {"torch_compile": True, "training_args": {"torch_compile_backend": "aot_eager"}},
        }.items()
    ]
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"learning_rate": 1}, "learning_rate is set by --learning-rate: give that instead"),
        ({"bf16": True}, "bf16 is set by --use-mixed-precision"),
        ({"remove_unused_columns": True}, "remove_unused_columns cannot be set: batches, evaluations"),
        ({"eval_strategy": "no"}, "eval_strategy cannot be set"),
        ({"adam_beta3": 1}, "no field 'adam_beta3': did you mean adam_beta"),
        ({"optim": "sgdd"}, "transformers refuses them: ValueError: sgdd is not a valid"),
        ({"optim": "galore_adamw"}, "transformers refuses them"),
        ({"warmup_ratio": 2}, "warmup_ratio must be at least 0 and below 1, got 2"),
        ({"hub_token": "secret"}, "hub_token is set by the login"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "accelerator_config cannot be set",
        ),
        ({"parallelism_config": {}}, "parallelism_config cannot be set"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau waits for the Trainer's evaluations"),
        ({"lr_scheduler_type": "greedy"}, "greedy waits for the Trainer's evaluations"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "refuses them: TypeError: .*num_decay_steps"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "refuses them: TypeError: .*'foo'"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "ZeroDivisionError"),
        ({"use_liger_kernel": True}, "needs the package liger-kernel"),
    ],
)
def test_those_that_are_refused(tmp_path: Path, given: dict[str, Any], rule: str) -> None:
    with pytest.raises(LogitcaskError, match=rule) as caught:
        training_arguments(train_settings("c", tmp_path / "run", training_args=given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_mixed_precision_on_a_machine_without_a_gpu(tmp_path: Path, device: str) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    arguments = training_arguments(train_settings("c", tmp_path / "run", use_mixed_precision=True, device=device))
    assert arguments.bf16
    assert arguments.use_cpu


def test_one_of_several_gpus_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Without torchrun the Trainer would run replicas of the student, which do not compute the loss."""
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 2, raising=False)
    assert training_arguments(train_settings("c", tmp_path / "run")).n_gpu == 1
    assert "1 of 2 GPUs is used: start with torchrun to use all of them" in capfd.readouterr().err


@pytest.mark.parametrize(("given", "rule"), [("{1}", "must be a file or a JSON"), ("/no/file", "no such config file")])
def test_what_is_neither_a_file_nor_json(given: str, rule: str) -> None:
    flags = {"cache": "c", "student_config": "tiny", "output_dir": "o", "training_args": given}
    with pytest.raises(LogitcaskError, match=rule):
        resolve(TrainSettings, None, flags)
