"""Options of all commands: each is given once, and ``~`` is the home folder wherever a path stands."""

import json
import pwd
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.cli import app, main
from logitcask.pipeline.command_line import grouped, is_repeatable
from logitcask.pipeline.mistakes import error_lines
from logitcask.pipeline.settings.base import Settings, expand_home, read_config, resolve
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.generate import GenerateSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.train.sources.file import file_source
from tests.support.tiny import RECORDS, make_cache, make_teacher, write_jsonl

ROOT: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {
    "": ROOT,
    **{name: command for name, command in ROOT.commands.items() if name != "cache"},
    **{f"cache {name}": command for name, command in ROOT.commands["cache"].commands.items()},
}
MODELS: dict[type[Settings], dict[str, object]] = {
    EvaluateSettings: {"model": "m", "cache": "c"},
    GenerateDataSettings: {"output_dir": "o"},
    GenerateSettings: {"model": "m", "prompt": "p"},
    PlanSettings: {"train_data": "d", "teacher_model": "7B"},
    PrecomputeSettings: {"teacher_model": "m", "train_data": "d", "output": "o"},
    TrainSettings: {"cache": "c", "student_model": "m", "output_dir": "o"},
}
NO_PLACES = {"device", "prompt", "base_url", "teacher_revision", "ray", "shards", "wandb_project", "wandb_run_name",
             "init_from_teacher_layers", "columns", "chat_template_kwargs", "data_config", "data_split", "where",
             "freeze", "student_revision", "attn_implementation", "lora_target_modules", "training_args",
             "loss", "push_to_hub", "select"}  # fmt: skip


def call(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process and return its exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["logitcask", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


def options(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_is_given_twice(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0
    for option in options(COMMANDS[name]):
        if option.multiple or option.opts[0].endswith("-completion"):
            continue
        seen += 1
        flag, last = option.opts[0], (option.secondary_opts or option.opts)[0]
        words = [flag, last] if option.is_flag else [flag, "3", f"{last}=4"]
        code, err = call([*name.split(), *words], monkeypatch, capsys)
        both = f"{flag} and {last}" if option.is_flag else f"{flag} '3' and {flag} '4'"
        assert (code, err) == (2, error_lines(f"{last}: is given twice, {both}: give it once", ""))
    assert seen or name == "demo"


def test_only_data_caches_and_prompts_are_repeatable() -> None:
    repeatable = {(name, o.name) for name, command in COMMANDS.items() for o in options(command) if o.multiple}
    data = {(name, "train_data") for name in ("precompute-logits", "train", "plan")}
    assert repeatable == {("split", "data"), ("train", "cache"), ("compare", "prompt"), *data}


def test_a_key_given_twice_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("alpha: 0.1\nbatch_size: 3\nalpha: 0.2\n")
    with pytest.raises(LogitcaskError, match="alpha is given 2 times"):
        read_config(file)
    file.write_text("prices:\n  a: [1, 2]\n  a: [3, 4]\n")
    with pytest.raises(LogitcaskError, match="a is given 2 times"):
        read_config(file)
    with pytest.raises(LogitcaskError, match="price of a is given twice"):
        resolve(GenerateDataSettings, None, {"output_dir": "o", "prices": "a=1/2, a=3/4"})


def test_several_data_files_are_labelled_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files, by flags or as a list in YAML, give the cache, the counts and the run of one file that holds both."""
    one, two, both = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "both"))
    write_jsonl(one, RECORDS[:5])
    write_jsonl(two, RECORDS[5:9])
    write_jsonl(both, RECORDS[:9])
    teacher = make_teacher(tmp_path / "teacher")
    cache = make_cache(tmp_path, teacher, train_data=(str(one), str(two)), output=tmp_path / "from-two")
    whole = make_cache(tmp_path, teacher, train_data=str(both), output=tmp_path / "from-one")
    assert json.loads((cache / "zarr.json").read_text()) == json.loads((whole / "zarr.json").read_text())
    source = file_source(Reading((str(one), str(two))), tmp_path, student_model=None, teacher_model=str(teacher),
                         online=False, max_seq_length=64, device="cpu", chat_turns="auto", columns={},
                         bad=BadRecords(tmp_path / "bad.jsonl"))  # fmt: skip
    assert source.amount.examples == 9
    data = ["--train-data", str(one), "--train-data", str(two)]
    for words in (
        ["plan", "--teacher-model", str(teacher), *data],
        ["precompute-logits", "--dry-run", "--teacher-model", str(teacher), *data, "--output", str(tmp_path / "no")],
    ):
        monkeypatch.setattr(sys, "argv", ["logitcask", *words])
        with pytest.raises(SystemExit):
            main()
        assert "9 examples" in capsys.readouterr().out
    config = tmp_path / "run.yaml"
    config.write_text(f"train_data: [{one}, {two}]\n")
    rest = {"teacher_model": "t", "output_dir": "o", "student_config": "s.json"}
    assert resolve(TrainSettings, config, rest).train_data == (str(one), str(two))
    write_jsonl(two, [{"prompt": "a"}])
    code, err = call(["plan", "--teacher-model", str(teacher), *data], monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: 1 bad records of 6: 1 x has columns ['prompt']; needs messages")
    assert f"{two}:1" in err


def test_a_single_data_file_is_stored_as_before() -> None:
    """Runs begun when there could be one alone are resumed: their settings hold a string."""
    usual = {"teacher_model": "t", "output_dir": "o", "student_config": "s.json"}
    assert resolve(TrainSettings, None, {**usual, "train_data": "a"}).model_dump(mode="json")["train_data"] == "a"
    several = resolve(TrainSettings, None, {**usual, "train_data": ["a", "b"]}).model_dump(mode="json")
    assert several["train_data"] == ["a", "b"]
    with pytest.raises(LogitcaskError, match="--train-data"):
        resolve(TrainSettings, None, {**usual, "train_data": []})


def places(model: type[Settings]) -> list[str]:
    """Return the fields that may name a file or folder: all of text or paths, but for those known to be neither."""
    kinds = {name: str(field.annotation) for name, field in model.model_fields.items()}
    texts = {name for name, kind in kinds.items() if "Path" in kind or "str" in kind}
    texts -= {name for name, kind in kinds.items() if "dict" in kind}
    return sorted(texts - NO_PLACES)


@pytest.mark.parametrize("model", MODELS)
def test_a_tilde_is_the_home_folder_in_every_path(
    model: type[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = places(model)
    assert names
    for name in names:
        usual = MODELS[model]
        if name in {"prompts", "model"} and model is GenerateDataSettings:
            usual = {**usual, "provider": "local", "model": "m", "prompts": "p"}
        if name == "tokenizer" and model is PrecomputeSettings:
            usual = {**usual, "engine": "server", "base_url": "http://h"}
        if name == "tokenizer" and model is GenerateDataSettings:
            server = {"provider": "openai-compatible", "base_url": "http://h", "model": "m", "prompts": "p"}
            usual = {**usual, **server, "logprobs": 8}
        if name == "student_config" and model is TrainSettings:
            usual = {key: value for key, value in usual.items() if key != "student_model"}
        if name in {"train_data", "chat_template"} and model is TrainSettings:
            usual = {"train_data": "d", "teacher_model": "t", "student_model": "m", "output_dir": "o"}
        value = getattr(resolve(model, None, {**usual, name: "~/x"}), name)
        assert (value[0] if isinstance(value, tuple) else str(value)) == str(tmp_path / "x"), name


@pytest.mark.parametrize("model", MODELS)
def test_every_option_is_in_one_group(model: type[Settings]) -> None:
    names = [name for names in grouped(model).values() for name in names]
    assert sorted(names) == sorted(model.model_fields)
    assert {name for line in model.groups.values() for name in line.split()} <= model.model_fields.keys()


def test_a_tilde_elsewhere_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for same in ("./~x", "a/~", "s3://b/~/x", "x~"):
        assert expand_home(same) == same
    assert resolve(GenerateSettings, None, {"model": "m", "prompt": "~/x is what?"}).prompt == "~/x is what?"


def test_a_tilde_in_the_options_of_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["cache", "info", "~/x"], ["cache", "verify", "~/x"], ["cache", "copy", "~/x", "~/y"],
                  ["compare", "~/x"], ["plot", "~/x", "--output=~/y.png"], ["train", "--config=~/x.yaml"]):  # fmt: skip
        code, err = call(words, monkeypatch, capsys)
        assert code == 2
        assert err.startswith(f"error: {tmp_path}/x"), err


def test_without_a_home_folder_only_what_needs_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(LogitcaskError, match="~/x: ~ is the home folder, which is unknown here: set HOME"):
        expand_home("~/x")
    settings = resolve(TrainSettings, None, MODELS[TrainSettings])
    assert settings.copies_folder == Path("~/.cache/logitcask")  # not used: the cache is in a folder
    with pytest.raises(LogitcaskError, match="set HOME"):
        _ = resolve(TrainSettings, None, {**MODELS[TrainSettings], "cache": "s3://b/c"}).copies_folder


def test_the_current_folder_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new")
    usual = MODELS[PrecomputeSettings]
    for typed in (".", "./", "inner/.."):
        assert Path(
            resolve(PrecomputeSettings, None, {**usual, "output": typed}).output
        ).name  # files beside it need one
    assert resolve(PrecomputeSettings, None, {**usual, "output": "."}).output == tmp_path / "new"


def test_a_run_is_not_put_into_its_cache() -> None:
    for inside in ("c", "c/run", "./c/../c/run"):
        with pytest.raises(LogitcaskError, match="is inside the cache c"):
            resolve(TrainSettings, None, {**MODELS[TrainSettings], "output_dir": inside})
    assert resolve(TrainSettings, None, {**MODELS[TrainSettings], "output_dir": "c-run"})


@pytest.mark.parametrize("model", MODELS)
def test_texts_are_text(model: type[Settings]) -> None:
    for bad in ("a\ud83d", "a\0b"):
        for name, field in model.model_fields.items():
            value = [bad] if is_repeatable(field) else bad
            with pytest.raises(LogitcaskError, match="valid Unicode text without NUL"):
                resolve(model, None, {**MODELS[model], name: value})
