"""The comparison with rivals: our side runs on tiny sizes, its figures are what they say, absent rivals are named."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from tests.benchmarks.rivals import learning, table
from tests.benchmarks.rivals.__main__ import compare
from tests.benchmarks.rivals.ours import larger
from tests.benchmarks.rivals.stock import Sizes, prepare
from tests.benchmarks.rivals.systems import Text
from tests.support.tiny import make_teacher

TINY = Sizes(windows=6, held_out=2, steps=4, rounds=1, students=())


class Fixed(PreTrainedModel):
    """A student that says what it was given, one window per call."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(PreTrainedConfig())
        self.calls = iter(logits)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=next(self.calls)[None])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rivals")
    make_teacher(folder / "teacher", max_length=256)
    return folder, compare(folder / "out", {}, {"tiny": str(folder / "teacher")}, TINY, {"tiny": 1})


def test_it_prints_its_tables_with_rivals_absent(found: tuple[Path, dict[str, Any]]) -> None:
    printed = table.report(json.loads(json.dumps(found[1])))
    assert "| Logitcask, standard |" in printed
    assert "| TRL, GKDTrainer | JSD, beta 0.5 |" in printed
    assert printed.endswith(
        "DistillKit: left out: no --distillkit\n\naxolotl: left out: no --axolotl\n\nMaxText: left out: no --maxtext"
    )


@pytest.mark.parametrize("name", ["Logitcask, rich", "Logitcask, exact"])
def test_the_windows_of_larger_labels_are_those_asked_for(found: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, text = found[0] / "out" / "tiny", Text(str(found[0] / "teacher"), 300)
    stock, (system,) = prepare(folder, text, TINY), [each for each in larger(text) if each.name == name]
    assert system.read is not None
    read, numbers = system.read(folder / name), np.array([1, 4])
    np.testing.assert_array_equal(read(numbers)["input_ids"].numpy(), stock.ids[numbers])


def test_bytes_and_steps_are_counted(found: tuple[Path, dict[str, Any]]) -> None:
    folder, results = found
    assert results["labels"]["Logitcask, standard"]["positions"] == 6 * 127
    stored = sum(
        file.stat().st_size for file in (folder / "out" / "tiny" / "Logitcask, standard").rglob("*") if file.is_file()
    )
    assert results["labels"]["Logitcask, standard"]["bytes"] == stored > 6 * 127 * 8
    assert [len(numbers) for numbers in learning.order(0, TINY)] == [2] * 4
    assert sorted(np.concatenate(learning.order(0, TINY)[:3])) == list(range(6))


def test_a_second_run_measures_nothing_again(found: tuple[Path, dict[str, Any]]) -> None:
    folder, results = found
    again = compare(folder / "out", {}, {"tiny": str(folder / "teacher")}, TINY, {"tiny": 1})
    assert again == results


def test_the_judge_is_the_dense_divergence(found: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = found
    stock = prepare(folder / "out" / "tiny", Text(str(folder / "teacher"), 300), TINY)
    rows = torch.randn(2, 128, 300, generator=torch.Generator().manual_seed(0))
    z = torch.stack([stock.logits(hidden) for hidden in stock.held_hidden]).double().flatten(0, 1)
    log_q = functional.log_softmax(rows[:, :-1].double().flatten(0, 1), dim=1)
    wanted = functional.kl_div(log_q, functional.log_softmax(z, dim=1), reduction="batchmean", log_target=True)
    assert learning.judge(Fixed(rows), stock)["kl"] == pytest.approx(float(wanted), abs=1e-9)


def test_the_page_has_the_recorded_figures() -> None:
    page = Path("docs/results/rivals.md").read_text(encoding="utf-8")
    lines = table.report(json.loads(Path("tests/benchmarks/results/rivals.json").read_text())).splitlines()
    assert [line for line in lines if line and line not in page] == []
