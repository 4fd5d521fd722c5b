"""The commands as users see them: help, config files, and what each command prints and writes."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.pipeline.cli import app, main
from logitcask.pipeline.mistakes import error_lines
from logitcask.pipeline.settings.base import Settings, config_file, resolve
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import read_records
from tests.support.runs import STUDENT, write_config
from tests.support.runs import train as train_run
from tests.support.tiny import RECORDS, make_cache, make_teacher, make_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
RUN_CONFIGS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
STUDENT_CONFIGS = sorted((ROOT / "configs" / "students").glob("*.json"))


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))
    if not getattr(command, "commands", None):
        yield words


COMMANDS = list(walk(typer.main.get_command(app)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a command in this process and returns its exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["logitcask", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_the_commands_are_registered() -> None:
    assert set(COMMANDS) >= {("generate-data",), ("precompute-logits",), ("train",), ("generate",), ("cache", "info")}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_ends_with_an_example(words: tuple[str, ...], run: Any) -> None:
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    last = " ".join(out.split("\n\n")[-1].split())
    assert last.startswith(f"Example: logitcask {' '.join(words)} ")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_in_groups_shows_choices_and_no_types_of_python(words: tuple[str, ...], run: Any) -> None:
    _, out, _ = run(*words, "-h")
    assert re.findall(r"<[a-z]+>|\[default: \{\}\]|\bstr\b|NoneType|Literal", out) == []
    titles = re.findall(r"^([A-Z][^\n:]*):$", out, re.MULTILINE)
    assert len(titles) == len(set(titles)) >= 1
    assert titles[-1] == "Options"  # with --help
    required = [word for line in out.splitlines() if "[required]" in line for word in re.findall(r"^  (--\S+)", line)]
    assert not required or titles[:1] in (["Required"], ["Arguments"])
    if words == ("train",):
        assert titles == ["Required", "Data", "Student", "Loss", "Optimizer", "Run", "Reporting", "Options"]
        assert "(sampled, bucket, renormalize)" in " ".join(out.split())
    if words == ("precompute-logits",):
        assert titles[:4] == ["Required", "Data", "Teacher", "Label"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_examples_name_options_that_exist(words: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word for word in str(command.epilog).split() if word.startswith("--")}
    assert used <= known
    assert all(parameter.help for parameter in command.params), words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_in_the_readme(words: tuple[str, ...]) -> None:
    assert f"logitcask {' '.join(words)}" in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("words", [[], ["train"], ["cache", "info"]], ids=["logitcask", "train", "cache info"])
def test_help_imports_neither_torch_nor_transformers_nor_zarr(words: list[str]) -> None:
    look = (
        "import sys\n"
        "from logitcask.pipeline.cli import main\n"
        f"sys.argv = ['logitcask', *{words!r}, '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as stopped:\n    assert not stopped.code\n"
        "assert not {'torch', 'transformers', 'zarr', 'datasets'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", look], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


@pytest.mark.parametrize("path", STUDENT_CONFIGS, ids=lambda path: path.name)
def test_student_configs_load(path: Path) -> None:
    values = json.loads(path.read_text())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    assert type(config) in AutoModelForCausalLM._model_mapping
    assert {name: getattr(config, name) for name in values if name != "rope_parameters"} == {
        name: value for name, value in values.items() if name != "rope_parameters"
    }
    assert "vocab_size" not in values  # the cache determines it


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.name)
def test_run_configs_load(path: Path) -> None:
    student = {"student_config": "tiny"} if path.name.startswith("guide-") else {}  # of any student
    settings = resolve(TrainSettings, path, {"cache": "c", "output_dir": "o", **student})
    assert settings.student_config is not None
    assert config_file("students", settings.student_config).is_file()


def test_there_are_configs() -> None:
    assert {path.name for path in STUDENT_CONFIGS} >= {"tiny.json", "100m.json", "350m.json", "1b.json"}
    assert RUN_CONFIGS


def test_a_flag_overrides_the_config_file(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainSettings] = []
    monkeypatch.setattr("logitcask.pipeline.train.train.run_training", seen.append)
    config = tmp_path / "run.yaml"
    config.write_text("alpha: 0.25\nbatch_size: 3\nuse_wandb: true\ncache: c\nstudent_config: s.json\n")
    assert run("train", "--config", config, "--batch-size", 5, "--no-use-wandb", "--output-dir", "o")[0] == 0
    assert (seen[0].alpha, seen[0].batch_size, seen[0].use_wandb) == (0.25, 5, False)


@pytest.mark.parametrize("model", [GenerateDataSettings, PrecomputeSettings, TrainSettings])
def test_each_setting_is_one_option(model: type[Settings]) -> None:
    names = {GenerateDataSettings: "generate-data", PrecomputeSettings: "precompute-logits", TrainSettings: "train"}
    command: Any = typer.main.get_command(app)
    options = {parameter.name: parameter for parameter in command.commands[names[model]].params}
    assert options.keys() - {"config", "help"} == model.model_fields.keys()
    for name, field in model.model_fields.items():
        assert options[name].default is None  # an option that is not given does not override the config file
        assert options[name].secondary_opts == (
            ["--no-" + name.rstrip("_").replace("_", "-")] if field.annotation in (bool, bool | None) else []
        )


def test_reporting_needs_its_package(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    student = write_config(tmp_path / "student.json", STUDENT)
    code, _, err = run("train", "--use-wandb", "--cache", make_cache(tmp_path), "--student-config", student,
                       "--output-dir", tmp_path / "run")  # fmt: skip
    assert code == 2
    assert err == error_lines("--use-wandb needs the package wandb: pip install 'logitcask[wandb]'", "logitcask train")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Create Python files with 12 documented functions, some of them methods, and code to skip."""
    folder = tmp_path / "tree"
    (folder / "package").mkdir(parents=True)
    one = 'def f{n}(a, b={n}):\n    """Add {n}."""\n    return a + b + {n}\n\n\n'
    method = 'class C{n}:\n    def m{n}(self):\n        """Give {n}."""\n        if self:\n            return {n}\n\n\n'
    (folder / "a.py").write_text("".join(one.format(n=n) for n in range(8)) + "def bare():\n    return 1\n")
    (folder / "package" / "b.py").write_text("".join(method.format(n=n) for n in range(4)))
    (folder / "package" / "broken.py").write_text("def (:\n")
    return folder


def generate_data(run: Any, tree: Path, output: Path, *more: object) -> Path:
    code, out, err = run("generate-data", "--source-dir", tree, "--output-dir", output, *more)
    assert (code, err) == (0, "")
    assert str(output / "train.jsonl") in out
    return output / "train.jsonl"


def test_generated_data_depend_only_on_the_seed(tree: Path, tmp_path: Path, run: Any) -> None:
    one, again = (generate_data(run, tree, tmp_path / name, "--seed", 3).read_bytes() for name in ("one", "again"))
    other = generate_data(run, tree, tmp_path / "other", "--seed", 4).read_bytes()
    assert one == again
    assert one != other
    assert sorted(one.splitlines()) == sorted(other.splitlines())
    few = generate_data(run, tree, tmp_path / "few", "--seed", 3, "--num-examples", 5).read_bytes()
    assert few.splitlines() == one.splitlines()[:5]


def test_generated_data_are_examples(tree: Path, tmp_path: Path, run: Any) -> None:
    path = generate_data(run, tree, tmp_path / "data")
    encoder = Encoder(make_tokenizer(), prompt_loss=False)
    records = [record for _, record in read_records([str(path)])]
    assert len(records) == 12
    for record in records:
        assert isinstance(record, dict)
        assert len(encoder.examples(record)) == 1
        (function,) = ast.parse(record["response"]).body
        assert isinstance(function, ast.FunctionDef)
        assert f"def {function.name}(" in record["prompt"]
        assert str(ast.get_docstring(function)) in record["prompt"]
        assert "return" not in record["prompt"]
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"]


def test_from_text_to_text(tmp_path: Path, run: Any) -> None:
    """Run every stage by its command: precompute, info, train, generate."""
    data, teacher = write_jsonl(tmp_path / "train.jsonl", RECORDS), make_teacher(tmp_path / "teacher")
    cache, output = tmp_path / "cache", tmp_path / "run"
    words = ["precompute-logits", "--teacher-model", teacher, "--train-data", data, "--output", cache,
             "--max-seq-length", 64, "--head-size", 4, "--shard-positions", 200]  # fmt: skip
    code, out, err = run(*words)
    assert code == 0
    assert re.fullmatch(rf"done      {cache}: 2 shards, [\d.]+ kB, \d+ bytes per position, \d+ s\n", out)
    assert "data      24 examples, " in err
    assert err.endswith(f"next      logitcask train --cache {cache} --student-model …\n")
    code, out, _ = run(*words)
    assert (code, out) == (0, f"complete  {cache} has all 2 shards; nothing to do\n")
    code, out, _ = run("cache", "info", cache, "--json")
    info = json.loads(out)
    assert code == 0
    assert info["manifest"]["data"]["examples"] == 24
    assert info["manifest"]["label"]["head_size"] == 4
    assert info["manifest"]["shards"]["count"] > 1
    assert info["bytes"] == sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    code, out, _ = run("cache", "info", cache)
    assert code == 0
    assert "head 4, tail 24 draws" in out
    student = write_config(tmp_path / "student.json", STUDENT)
    code, out, _ = run("train", "--cache", cache, "--student-config", student, "--output-dir", output, "--max-steps", 2)
    assert code == 0
    assert "perplexity" in out
    for sampling in ("0", "1.0"):
        code, out, _ = run("generate", "--model", output / "final", "--prompt", "How many", "--max-new-tokens", 8,
                           "--temperature", sampling)  # fmt: skip
        assert code == 0
        assert out.strip()


def test_generated_text_is_the_models_own(tmp_path: Path, run: Any) -> None:
    """A student that memorised one answer gives it, through the chat template, and stops."""
    record: dict[str, object] = {"prompt": "Hello", "response": "apples and bread"}
    data = write_jsonl(tmp_path / "one.jsonl", [record])
    cache = make_cache(tmp_path, make_teacher(tmp_path / "chat", chat=True), train_data=str(data))
    student = train_run(cache, tmp_path / "run", distillation_type="output", max_steps=40, learning_rate=2e-2) / "final"
    code, out, _ = run("generate", "--model", student, "--prompt", "Hello", "--max-new-tokens", 30)
    assert (code, out) == (0, "apples and bread\n")
