"""Malformed models, tokenizers, runs, checkpoints and caches end in exit code 2 and at most three lines on stderr.

Each test feeds a group of commands a table of inputs, some generated, in one process, and lists all that went wrong.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.malformed import JUNK, PATHS, Case, make_stock, replaced, usual, wrong
from tests.support.runs import STUDENT


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock(tmp_path_factory.mktemp("stock"))


# ---------------------------------------------------------------- students, models, tokenizers

CHANGES: dict[str, list[Any]] = {
    "model_type": [None, "", "x", 1, [], "bert", "vit", "llama" * 999, "\ud83d"],
    "hidden_size": [None, "x", -1, 0, 1.5, [], {}, 33],
    "num_hidden_layers": [None, "x", [], {}, 1.5],
    "num_attention_heads": [None, "x", 0, 3, [], 1.5],
    "num_key_value_heads": ["x", 0, 3, []],
    "intermediate_size": [None, "x", -1, [], 1.5],
    "max_position_embeddings": ["x", [], -1, 3],
    "vocab_size": [None, "x", -1, 5, [], 1.5],
    "hidden_act": [None, "x", 1, []],
    "rope_parameters": ["x", 1, [], {"rope_type": "x"}],
    "rms_norm_eps": ["x", [], None],
    "quantization_config": ["x", {}, {"quant_method": "x"}, {"quant_method": "fp8"}],
    "dtype": ["x", 1, "float4"],
    "pad_token_id": ["x", 10**6, []],
    "initializer_range": ["x", []],
}
NOT_CONFIGS = ["", "{", "[]", "1", "null", '"x"', "{}", "[" * 9000, '{"a": NaN}', "\ufeff{}",
               '{"model_type": "\\ud83d"}', "9" * 5000]  # fmt: skip


def test_student_configs(stock: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.json"
    train = ["--quiet", *replaced(usual(stock, tmp_path)["train"], "--student-config", file)]
    plan = replaced(usual(stock, tmp_path)["plan"], "--student-config", file)

    def cases() -> Iterator[Case]:
        for content in NOT_CONFIGS:
            file.write_text(content)
            yield content[:20], train
            yield f"plan {content[:20]}", plan
        for name, values in CHANGES.items():
            for value in values:
                file.write_text(json.dumps({**STUDENT, name: value}))
                yield f"{name} {value}"[:40], [*train, "--max-steps", 1]

    assert "\n".join(wrong(cases(), fewest=60)) == ""


def changed(file: Path, contents: Iterable[bytes]) -> Iterator[bytes]:
    """Write each of the contents in place of a file, then the file's own again."""
    own = file.read_bytes()
    for content in contents:
        file.write_bytes(content)
        yield content[:20]
    file.write_bytes(own)


def spoilt(content: bytes) -> list[bytes]:
    """Return a file's content, spoilt in several ways."""
    half = len(content) // 2
    return [b"", b"\0" * 99, b"{", b"[]", b"1", b"null", b"\xff\xfe", content[:half], content[:-1], b'{"a": 1}',
            content[:half] + b"\0" + content[half + 1 :], b"[" * 9000]  # fmt: skip


def of_models(stock: Path, new: Path, model: Path) -> dict[str, list[object]]:
    lines = usual(stock, new)
    return {
        "generate": replaced([*lines["generate"], "--max-new-tokens", 1], "--model", model),
        "evaluate": replaced(lines["evaluate"], "--model", model),
        "precompute": replaced([*lines["precompute-logits"], "--overwrite"], "--teacher-model", model),
        "plan": replaced(lines["plan"], "--teacher-model", model),
        "train": ["--quiet", "train", "--cache", stock / "cache", "--student-model", model, "--output-dir", new / "r",
                  "--max-steps", 1],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["generate", "evaluate", "precompute", "plan", "train"])
def test_models(name: str, stock: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(stock / "run" / "final", model)
    words = of_models(stock, tmp_path, model)[name]
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = json.loads((model / "tokenizer_config.json").read_text())

    def cases() -> Iterator[Case]:
        files = ["config.json", "tokenizer.json", "tokenizer_config.json"]
        for file in files + ([] if name == "plan" else ["model.safetensors"]):
            for what in changed(model / file, spoilt((model / file).read_bytes())):
                yield f"{file} {what!r}", words
        for key, values in CHANGES.items() if name in ("generate", "train") else ():
            for what in changed(model / "config.json", (json.dumps({**config, key: v}).encode() for v in values)):
                yield f"config {key} {what!r}", words
        for key in tokenizer if name == "plan" else ():
            junk = (json.dumps({**tokenizer, key: v}).encode() for v in ("x", 1, [1]))
            for what in changed(model / "tokenizer.json", junk):
                yield f"tokenizer {key} {what!r}", words
        for key in ("eos_token", "tokenizer_class", "extra_special_tokens", "model_max_length", "chat_template"):
            junk = (json.dumps({**special, key: v}).encode() for v in ("x" * 99, 1, [1], {"a": 1}))
            for what in changed(model / "tokenizer_config.json", junk):
                yield f"tokenizer config {key} {what!r}", words

    assert "\n".join(wrong(cases(), allowed=(0, 2), fewest=60 if name in ("generate", "train", "plan") else 20)) == ""


# ---------------------------------------------------------------- run folders, checkpoints

LOGS = ["", "{", "[]", "1", "null", "{}", '{"step": "x"}', '{"step": 1.5}', '{"step": null}', '{"step": -1}', "\0",
        '{"step": 1, "total_loss": "x"}', '{"step": 1, "total_loss": [1]}', '{"step": 1, "total_loss": true}',
        '{"step": 1e999}', '{"step": 1, "total_loss": NaN}', "[" * 9000, '{"step": ' + "9" * 5000 + "}",
        '{"step": 99999999999999999999, "total_loss": 1}', '{"step": 1, "total_loss": 1e308, "tokens": 1e308}',
        '{"step": 1, "total_loss": ' + "9" * 400 + "}", '{"step": 1, "\ud83d": 1}',
        '{"step": 1, "tokens": 5, "tokens_per_second": 0}']  # fmt: skip


@pytest.mark.parametrize("command", ["compare", "plot"])
def test_run_folders(command: str, stock: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stock / "run", run)
    words: list[object] = [command, run, *(["--output", tmp_path / "x.png"] if command == "plot" else [])]

    def cases() -> Iterator[Case]:
        for what in changed(run / "metrics.jsonl", (f"{line}\n".encode(errors="surrogatepass") for line in LOGS)):
            yield f"log {what!r}", words
        for file in ("metrics.json", "final/settings.json", "evaluation.json") if command == "compare" else ():
            (run / file).touch()
            for what in changed(run / file, spoilt((run / file).read_bytes())):
                yield f"{file} {what!r}", words
            for what in changed(run / file, (json.dumps({"before": v, "after": v, "model": v, "tail": v}).encode(
                    errors="surrogatepass") for v in JUNK)):  # fmt: skip
                yield f"{file} {what!r}", words
            if file == "evaluation.json":
                (run / file).unlink()
        for path in ("", "nowhere", tmp_path, __file__, "a\0b"):
            yield f"run {path}", [command, path]

    assert "\n".join(wrong(cases(), allowed=(0, 2), fewest=60 if command == "compare" else 25)) == ""


def test_checkpoints(stock: Path, tmp_path: Path) -> None:
    words: list[object] = ["--quiet", *usual(stock, tmp_path)["train"], "--max-steps", 2, "--save-steps", 1,
                           "--resume-from-checkpoint", tmp_path / "run" / "checkpoint-1"]  # fmt: skip
    shutil.copytree(stock / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    own = json.loads((checkpoint / "settings.json").read_text())

    def cases() -> Iterator[Case]:
        for file in sorted(path.name for path in checkpoint.iterdir()):
            content = (checkpoint / file).read_bytes()
            for what in changed(checkpoint / file, [*spoilt(content)[:4], *spoilt(content)[6:9]]):
                yield f"{file} {what!r}", words
        for key in own:
            for what in changed(
                checkpoint / "settings.json", (json.dumps({**own, key: v}).encode() for v in JUNK[5:7])
            ):
                yield f"settings {key} {what!r}", words
        for path in ("", "latest ", "nowhere", tmp_path, tmp_path / "run", tmp_path / "run" / "final", "a\0b"):
            yield f"checkpoint {path}", [*words[:-1], path]

    assert "\n".join(wrong(cases(), allowed=(0, 2), fewest=60)) == ""


# ---------------------------------------------------------------- caches

URLS = ["s3://", "s3:///", "s3:///x", "gs://", "hf://", "hf://x", "ssh://", "://", "://x", "x://y", "ftp:x", "file://",
        "http://[", "s3://b/a.zip", "memory://x", "C:\\x", "-x", "s3://\udcff", "s3://a\0b", "ssh://h:x/y"]  # fmt: skip


@pytest.mark.parametrize("command", ["info", "verify", "copy"])
def test_cache_paths(command: str, stock: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "x.zip").write_text("x")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "zarr.json").write_text("x")
    places = [*(tmp_path / name for name in ("empty", "file", "x.zip", "junk", "nowhere")), *PATHS, *URLS]
    copies: list[object] = [tmp_path / "copy"] if command == "copy" else []

    def cases() -> Iterator[Case]:
        for place in places:
            yield f"{place}"[:20], ["cache", command, "--" if str(place).startswith("-") else place, *copies]
        shutil.copytree(stock / "cache", tmp_path / "cache")
        group = tmp_path / "cache" / "zarr.json"
        own = json.loads(group.read_text())
        manifest = own["attributes"]["logitcask"]
        for data in spoilt(group.read_bytes()):
            group.write_bytes(data)
            yield f"group {data[:20]!r}", ["cache", command, tmp_path / "cache", *copies]
        for key in manifest:
            for value in JUNK[:8]:
                if value == manifest[key]:
                    continue
                own["attributes"]["logitcask"] = {**manifest, key: value}
                group.write_text(json.dumps(own))
                yield f"{key} {value}", ["cache", command, tmp_path / "cache", *copies]

    assert "\n".join(wrong(cases(), fewest=60)) == ""


# ---------------------------------------------------------------- generated data, and the environment

PROMPTS = ["", "[]", "x", "{}", "languages: [a]", "languages: []\ntopics: [a]\ncategories: {a: [b]}", "a: [",
           *(f"languages: {a}\ntopics: {b}\ncategories: {c}" for a, b, c in (
               ("[a]", "[b]", "[c]"), ("[1]", "[b]", "{c: [d]}"), ("[a]", "x", "{c: [d]}"), ("[a]", "[b]", "{c: d}"),
               ("[a]", "[b]", "{c: ['{x}']}"), ("[a]", "[b]", "{c: ['{']}"), ("[a]", "[b]", "{c: ['{0}']}"),
               ("[a]", "[b]", "{c: ['{language!r}']}"), ("[a]", "[b]", "{c: ['{topic.x}']}"),
               ("[a]", "[b]", "{c: [d]}"),
               ("[\"\\ud83d\"]", "[b]", "{c: ['{language}']}"), ("[a]", "[b]", "{1: [d]}")))]  # fmt: skip
ANSWERS = [b"{", b"{}\n", b"[]\n", b"\xff\n", b"\0\n", b"1\n", b"[" * 9000 + b"\n", b'{"id": 1}\n']


def test_generated_data(stock: Path, tmp_path: Path) -> None:
    prompts, folder = tmp_path / "prompts.yaml", tmp_path / "data"
    local: list[object] = ["generate-data", "--provider", "local", "--model", stock / "run" / "final", "--prompts",
                           prompts, "--output-dir", folder, "--num-examples", 9, "--max-new-tokens", 1]  # fmt: skip

    def cases() -> Iterator[Case]:
        for content in PROMPTS:
            prompts.write_text(content)
            yield content, local
        for name, contents in (("answers.jsonl", ANSWERS), ("manifest.json", spoilt(b'{"made_by": {"seed": 0}}'))):
            for data in contents:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                (folder / name).write_bytes(data or b" ")
                yield f"{name} {data[:20]!r}", local
        shutil.rmtree(folder)
        for url in (
            "",
            "x",
            "ftp://x",
            "http://",
            "http://[",
            "http://u:p@h",
            "http://h?q",
            "http://h:x",
            "http://h:99999",
        ):
            yield url, ["generate-data", "--provider", "openai-compatible", "--model", "m", "--prompts", "code",
                        "--output-dir", folder, "--base-url", url]  # fmt: skip
        for prices in ("", "x", "m", "m=", "m=1", "m=1/x", "m=-1/2", "m=1/2/3", "=1/2", "m=nan/1", "m=1/2,m=1/2"):
            yield prices, ["generate-data", "--provider", "openai", "--model", "m", "--prompts", "code", "--output-dir",
                           folder, "--prices", prices]  # fmt: skip
        for words in (["--provider", "openai"], ["--provider", "anthropic"], ["--model", "m"], ["--max-cost", "1"]):
            yield str(words), ["generate-data", "--output-dir", folder, *words]

    assert "\n".join(wrong(cases(), fewest=60)) == ""
