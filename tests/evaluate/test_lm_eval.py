"""logitcask evaluate --tasks: a custom task in lm-evaluation-harness, its score against plain forward passes.

The harness has many dependencies and the test extra does not install it: ``pip install 'logitcask[lm-eval]'``.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.pipeline.cli import main
from logitcask.pipeline.mistakes import error_lines
from tests.support.mistakes import said
from tests.support.tiny import WORDS, make_teacher, write_jsonl

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None and "CI" not in os.environ, reason="lm-eval is not installed"
)

DOCS: list[dict[str, object]] = [
    {"prompt": f"How many {word} are {n}+2?", "choices": ["There are 4 apples", "bread and coffee"], "label": n % 2}
    for n, word in enumerate(WORDS)
]
TASK = """
task: fruit
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a model, and a task with its data."""
    folder = tmp_path_factory.mktemp("harness")
    make_teacher(folder / "model")
    data = write_jsonl(folder / "data.jsonl", DOCS)
    (folder / "fruit.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process and returns its exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        usual = ["logitcask", "evaluate", "--device", "cpu", "--model", str(place / "model")]
        monkeypatch.setattr(sys, "argv", [*usual, *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def log_likelihood(model: torch.nn.Module, prompt: list[int], choice: list[int]) -> float:
    ids = torch.tensor([prompt + choice])
    with torch.inference_mode():
        log_p = model(ids).logits[0].double().log_softmax(1)
    return float(log_p[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum())


@harness
def test_the_score_of_a_custom_task_matches_forward_passes(place: Path, run: Run) -> None:
    model, tokenizer = (kind.from_pretrained(place / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    right = []
    for doc in DOCS[:6]:
        prompt, choices = tokenizer.encode(str(doc["prompt"])), [f" {c}" for c in doc["choices"]]  # type: ignore[attr-defined]
        likely = [log_likelihood(model.eval(), prompt, tokenizer.encode(choice)) for choice in choices]
        right.append(likely.index(max(likely)) == doc["label"])
    code, out, _ = run("--tasks", place / "fruit.yaml", "--limit", 6, "--json")
    assert code == 0
    printed = json.loads(out)
    assert (printed["on_cache"], printed["humaneval"]) == (None, None)
    (score,) = printed["tasks"]
    assert (score["task"], score["metric"], score["examples"]) == ("fruit", "acc", 6)
    assert score["value"] == pytest.approx(sum(right) / 6)
    assert 0 < sum(right) < 6, "a score of 0 or 1 would prove little"
    assert score["standard_error"] > 0
    code, out, _ = run("--tasks", place / "fruit.yaml")
    assert code == 0
    assert "fruit, acc, 8 examples" in " ".join(out.split())


@harness
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("fruit", "--tasks: no task fruit"),
        ("{place}/none.yaml", "none.yaml: no such file"),
        ("{place}/list.yaml", "list.yaml: lm-evaluation-harness cannot run it: ValueError: Expected YAML dict"),
        ("{place}/unsafe.yaml", "fruit which is marked as unsafe"),
        ("{place}/gone.yaml", "gone.yaml: lm-evaluation-harness cannot run it: FileNotFoundError"),
    ],
)
def test_an_invalid_task_is_a_one_line_error(tasks: str, message: str, place: Path, run: Run) -> None:
    (place / "list.yaml").write_text("- 1\n")
    (place / "unsafe.yaml").write_text(f"{(place / 'fruit.yaml').read_text()}unsafe_code: true\n")
    (place / "gone.yaml").write_text(TASK.format(data=place / "gone.jsonl"))
    code, out, err = run("--tasks", tasks.format(place=place))
    assert (code, out) == (2, ""), err
    assert message in said(err)


def test_a_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, out, err = run("--tasks", "hellaswag")
    assert (code, out) == (2, "")
    assert err == error_lines(
        "--tasks needs the package lm-eval: pip install 'logitcask[lm-eval]'", "logitcask evaluate"
    )
