"""--chat-template and --chat-template-kwargs: everybody renders as the cache and the student have it, or an error."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.pipeline.cli import main
from logitcask.pipeline.plan.dry_run import dry_run
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.tokenizer import as_chat, load_tokenizer, tokenizer_from_files
from tests.support.mistakes import said
from tests.support.runs import train
from tests.support.tiny import (
    CHATML,
    RECORDS,
    folder_bytes,
    make_cache,
    make_teacher,
    make_tokenizer,
    precompute_settings,
    write_jsonl,
)

THINKS = CHATML.replace(
    "<|im_start|>assistant\n", "<|im_start|>assistant\n{% if enable_thinking is not false %}think{% endif %}"
)
OFF = {"enable_thinking": False}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_teacher(tmp_path / "teacher", chat=True)
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "thinks.jinja").write_text(THINKS)
    return tmp_path


def prompt(tokenizer: Any, **kwargs: Any) -> str:
    question = [{"role": "user", "content": "?"}]
    return str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **kwargs))


def test_the_cache_and_the_student_render_with_the_file_and_the_values(place: Path) -> None:
    cache = make_cache(
        place, place / "teacher", train_data=str(place / "train.jsonl"), chat_template=place / "thinks.jinja",
        chat_template_kwargs=OFF,
    )  # fmt: skip
    stored = tokenizer_from_files(CacheReader(cache).tokenizer_files())
    assert as_chat(stored, "?") == prompt(stored) == prompt(make_tokenizer(chat=True))
    assert prompt(stored, enable_thinking=True).endswith("assistant\nthink"), "they are defaults"
    assert "values given to the chat template: {" in render(describe(cache))
    run = train(cache, place / "run", max_steps=1)
    assert load_tokenizer(str(run / "final")).chat_template == stored.chat_template


def test_training_on_files_uses_them(place: Path) -> None:
    options = {"chat_template": str(place / "thinks.jinja"), "chat_template_kwargs": OFF}
    run = train(
        None, place / "run", train_data=str(place / "train.jsonl"), teacher_model=str(place / "teacher"), max_steps=1,
        distillation_type="output", **options,
    )  # fmt: skip
    assert prompt(load_tokenizer(str(run / "final"))) == prompt(make_tokenizer(chat=True))


def test_without_them_a_manifest_has_no_trace_and_other_values_are_refused_by_name(place: Path) -> None:
    data = {"train_data": str(place / "train.jsonl"), "chat_template": place / "thinks.jinja"}
    cache = make_cache(place, place / "teacher", **data)
    assert "chat_template_kwargs" not in (cache / "zarr.json").read_text()
    with pytest.raises(CacheMismatchError, match=r"data\.chat_template_kwargs: .*enable_thinking"):
        precompute(precompute_settings(place, **data, chat_template_kwargs=OFF))
    settings = precompute_settings(place, **data, chat_template_kwargs=OFF, output=place / "off")
    precompute(settings)
    wanted = folder_bytes(place / "off")
    precompute(settings)
    assert folder_bytes(place / "off") == wanted
    assert CacheReader(place / "off").manifest.data.chat_template_kwargs == '{"enable_thinking": false}'


def test_the_dry_run_counts_with_them(place: Path) -> None:
    (place / "long.jinja").write_text(
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ more }}", 1)
    )
    plain = dry_run(precompute_settings(place))
    longer = dry_run(precompute_settings(place, chat_template=place / "long.jinja", chat_template_kwargs={"more": "!"}))
    assert longer.tokens == plain.tokens + 2 * len(RECORDS)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, 1e22, "", 'a "quoted" %} {{ \\n \n é 🙂', [1, [None]], {"k": {"x": [False]}}],
)
def test_any_json_value_reaches_the_template_and_its_own_text_stays(value: Any) -> None:
    tokenizer = make_tokenizer(chat=True)
    for start in ("", "\n", "\n\n  "):  # line ends and blanks before a block are dropped by the rules of templates
        tokenizer.chat_template = start + "{% if true %} {% endif %}{{ x | tojson }} {{ y is defined }}"
        wanted = prompt(tokenizer, x=value)
        set_template(tokenizer, None, {"x": value})
        assert prompt(tokenizer) == wanted
        assert json.loads(wanted.strip().removesuffix(" False")) == value


def test_named_templates_each_get_the_values_that_they_read() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = {"default": THINKS, "tool_use": CHATML}
    set_template(tokenizer, None, OFF)
    assert prompt(tokenizer) == prompt(make_tokenizer(chat=True))
    assert tokenizer.chat_template["tool_use"] == CHATML


@pytest.mark.parametrize("name", ["other", "messages", "tools", "raise_exception", "strftime_now", "eos_token"])
def test_a_variable_that_has_no_effect_is_refused(name: str) -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = THINKS + "{{ tools }}{{ raise_exception }}{{ strftime_now }}{{ eos_token }}"
    with pytest.raises(LogitcaskError, match=f"does not read '{name}': it reads enable_thinking"):
        set_template(tokenizer, None, {name: 1})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat-template", "none.jinja"], "--chat-template none.jinja: cannot be read"),
        (["--chat-template", "bad.jinja"], "--chat-template bad.jinja: is no Jinja template: line 2: "),
        (["--chat-template", "empty.jinja"], "--chat-template empty.jinja: is empty"),
        (["--chat-template", "latin.jinja"], "--chat-template latin.jinja: cannot be read"),
        (["--chat-template-kwargs", "{enable"], "--chat-template-kwargs: must be a JSON object"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs: must be a JSON object"),
        (["--chat-template-kwargs", '{"a": NaN}'], "--chat-template-kwargs: must be a JSON object"),
        (["--chat-template-kwargs", '{"a": "\\ud800"}'], "--chat-template-kwargs: must be valid Unicode"),
        (["--chat-template-kwargs", '{"thinking": 1}'], "the chat template does not read 'thinking': it reads none"),
    ],
)
@pytest.mark.parametrize("command", ["precompute-logits", "plan"])
def test_a_mistake_is_one_line(
    command: str,
    words: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    Path("bad.jinja").write_text("a\n{% for %}")
    Path("empty.jinja").write_text("\n")
    Path("latin.jinja").write_bytes(b"\xe9")
    more = ["--output", "cache"] if command == "precompute-logits" else []
    usual = [command, "--teacher-model", "teacher", "--train-data", "train.jsonl"]
    monkeypatch.setattr(sys, "argv", ["logitcask", *usual, *more, *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said(err)
    assert not Path("cache").exists() or not any(Path("cache").iterdir())


@pytest.mark.parametrize("option", [{"chat_template": "x.jinja"}, {"chat_template_kwargs": {"a": 1}}])
def test_training_from_a_cache_refuses_them(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="apply to --train-data: give them to precompute-logits"):
        train(tmp_path / "cache", tmp_path / "run", **option)
