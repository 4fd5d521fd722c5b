"""Gradient checkpointing turns on by itself, and says so, where a step would not fit; here in a container's limit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from logitcask.pipeline.machine import free_memory
from logitcask.pipeline.runs.run_folder import read_run
from tests.support.runs import losses, train

CPU = torch.device("cpu")


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    system = free_memory(CPU, tmp_path)
    for limit, wanted in (("max", None), ("9000", 8000), ("500", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1000\n")
        free = free_memory(CPU, tmp_path)
        assert free == wanted if wanted is not None else (free is None) == (system is None)


def test_checkpointing_turns_on_where_a_step_does_not_fit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(cache, tmp_path / "plain")
    assert "gradient checkpointing" not in capsys.readouterr().err
    (tmp_path / "memory.max").write_text("9000")
    (tmp_path / "memory.current").write_text("1000")
    monkeypatch.setattr("logitcask.pipeline.train.train.free_memory", lambda device: free_memory(device, tmp_path))
    enabled, enable = list[str](), PreTrainedModel.activation_checkpointing_enable

    def watched(model: Any, *args: Any, **named: Any) -> None:
        enabled.append("products" if "context_fn" in str(args) else "inputs")
        enable(model, *args, **named)

    monkeypatch.setattr(PreTrainedModel, "activation_checkpointing_enable", watched)
    small = train(cache, tmp_path / "small")
    assert "memory    gradient checkpointing is on: a step takes about" in capsys.readouterr().err
    assert enabled == ["inputs"]
    assert [read_run(run).settings["use_gradient_checkpointing"] for run in (plain, small)] == [False, True]
    np.testing.assert_allclose(losses(small), losses(plain), rtol=1e-5)
    train(cache, tmp_path / "never", use_gradient_checkpointing=False)
    assert "gradient checkpointing" not in capsys.readouterr().err
    assert enabled == ["inputs", "products"]
