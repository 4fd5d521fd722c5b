"""Malformed arguments, config files and data end in exit code 2 and at most three lines on stderr, for every command.

Each test feeds a group of commands a table of inputs, some generated, in one process, and lists all that went wrong.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.malformed import JUNK, PATHS, Case, make_stock, replaced, usual, wrong


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock(tmp_path_factory.mktemp("stock"))


# ---------------------------------------------------------------- arguments

NUMBERS = [
    "",
    " ",
    "x",
    "nan",
    "inf",
    "-1",
    "1e999",
    "9" * 5000,
    "0x10",
    "1,5",
    "None",
    "٣x",
    "1_0_",
    "--",
    "[]",
    "1 2",
]
NUMERIC = {
    "generate-data": ["--num-examples", "--max-new-tokens", "--seed", "--near-duplicate"],
    "precompute-logits": ["--head-size", "--batch-size", "--shard-positions", "--seed", "--temperatures", "--workers"],
    "train": ["--alpha", "--batch-size", "--epochs", "--max-steps", "--learning-rate", "--eval-fraction"],
    "plan": ["--max-seq-length", "--batch-size", "--price", "--teacher-tokens-per-second"],
    "evaluate": ["--limit", "--batch-size", "--k", "--samples"],
    "generate": ["--max-new-tokens", "--temperature", "--seed"],
}
CHOICES = [("precompute-logits", "--dtype"), ("precompute-logits", "--preset"), ("precompute-logits", "--engine"),
           ("train", "--distillation-type"), ("train", "--tail"), ("train", "--divergence"), ("train", "--device"),
           ("train", "--mixed-precision-dtype"), ("plan", "--preset"), ("plan", "--device"),
           ("generate", "--device"), ("evaluate", "--device"), ("precompute-logits", "--device"),
           ("precompute-logits", "--shards"), ("generate-data", "--provider"), ("train", "--temperature")]  # fmt: skip
INPUTS = [("precompute-logits", "--teacher-model"), ("precompute-logits", "--train-data"), ("train", "--cache"),
          ("train", "--student-config"), ("plan", "--train-data"), ("plan", "--teacher-model"),
          ("evaluate", "--model"), ("evaluate", "--cache"), ("generate", "--model"), ("plan", "--student-config"),
          ("generate-data", "--source-dir")]  # fmt: skip
COMMANDS = ["generate-data", "precompute-logits", "train", "plan", "evaluate", "generate", "compare", "plot",
            "cache info", "cache verify", "cache copy"]  # fmt: skip


@pytest.mark.parametrize("command", NUMERIC)
def test_numbers(command: str, stock: Path, tmp_path: Path) -> None:
    words = usual(stock, tmp_path)[command]
    cases = [(f"{flag} {value[:9]}", replaced(words, flag, value)) for flag in NUMERIC[command] for value in NUMBERS
             if (flag, value) != ("--temperatures", "1,5")]  # fmt: skip
    assert "\n".join(wrong(cases, fewest=44)) == ""


def test_choices(stock: Path, tmp_path: Path) -> None:
    lines = usual(stock, tmp_path)
    junk = ["", " ", "x", "CUDA", "float31", "cuda:99", "1/0", "0/1", "\ud83d", "a\0b", "-", "[]", "x" * 5000]
    cases = [(f"{name} {flag} {value[:9]}", replaced(lines[name], flag, value)) for name, flag in CHOICES
             for value in junk]  # fmt: skip
    assert "\n".join(wrong(cases, fewest=60)) == ""


def test_paths(stock: Path, tmp_path: Path) -> None:
    lines = usual(stock, tmp_path)
    cases = [(f"{name} {flag} {path[:9]}", replaced(lines[name], flag, path)) for name, flag in INPUTS
             for path in PATHS]  # fmt: skip
    assert "\n".join(wrong(cases, fewest=60)) == ""


def test_outputs(stock: Path, tmp_path: Path) -> None:
    lines = usual(stock, tmp_path)
    lines["generate-data"] += ["--source-dir", tmp_path / "code"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text('def f():\n    """F."""\n    return 1\n')
    lines["train"].insert(0, "--quiet")  # what it says of the run before it writes is not counted
    (tmp_path / "file").write_text("mine")
    bad = [f"{tmp_path}/file/x", f"{tmp_path}/a\0b", f"{tmp_path}/{'x' * 300}", f"{tmp_path}/\udcff", "~nobody-here/x"]
    outputs = [("generate-data", "--output-dir"), ("precompute-logits", "--output"), ("train", "--output-dir"),
               ("evaluate", "--output")]  # fmt: skip
    cases = [(f"{name} {flag} {path}", replaced(lines[name], flag, path)) for name, flag in outputs for path in bad]
    run = stock / "run"
    for path in bad:
        cases += [(f"compare to {path}", ["compare", run, "--output", path]),
                  (f"plot to {path}", ["plot", run, "--output", f"{path}.png"]),
                  (f"plot cache to {path}", ["cache", "info", stock / "cache", "--plot", f"{path}.png"]),
                  (f"copy to {path}", ["cache", "copy", stock / "cache", path])]  # fmt: skip
    assert "\n".join(wrong(cases, fewest=40)) == ""
    assert (tmp_path / "file").read_text() == "mine"


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(COMMANDS), st.lists(st.text(max_size=9) | st.sampled_from(
    ["--cache", "--config", "--json", "--output", "-", "--", "--quiet", "--seed", "1", "--ray", "=", "--x=1"]),
    max_size=5))  # fmt: skip
def test_any_words(command: str, words: list[str]) -> None:
    assert "\n".join(wrong([("words", [*command.split(), *words])], allowed=(0, 2))) == ""


# ---------------------------------------------------------------- config files

CONFIGS = ["", "- 1", "x", "1", "null", "a: [", "a: {", "a: b: c", "? [1]\n: 2", "{[1]: 2}", "&a [*a]", "a: &a [*a]",
           "a: *b", "!!python/object:os.system {}", "!x y", "a: 2024-13-45", "a: 0b2", "\ttab: 1", "a: \"\\ud83d\"",
           "alpha: \"a\\0b\"", "%YAML 9.9\n---\na: 1", "--- 1\n--- 2", "[" * 3000, "{a: " * 1500, "a: 1\na: 2",
           "<<: 1", "<<: [1]", "batch_size: &a [*a]", "batch_size: {}", "batch_size: 1e400", "seed: .nan", "1: 2",
           "null: 1", "config: x", "batch_size: \"" + "9" * 5000 + "\"", "batch_size: " + "9" * 5000]  # fmt: skip
FIELDS = ["seed", "model", "teacher_model", "train_data", "cache", "output", "output_dir", "student_config",
          "prompts", "temperatures", "k", "tasks", "prices", "device", "shards", "student_model", "json_", "use_wandb",
          "source_dir", "local_copies", "resume_from_checkpoint", "prompt"]  # fmt: skip


@pytest.mark.parametrize("command", ["generate-data", "precompute-logits", "train", "plan", "evaluate", "generate"])
def test_config_files(command: str, stock: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"

    def cases() -> Iterator[Case]:
        for content in CONFIGS:
            file.write_bytes(content.encode(errors="surrogatepass"))
            yield content[:20], [*usual(stock, tmp_path)[command], "--config", file]
        for data in (b"\xff", b"\xff\xfea\0", b"a: \x07", b"\0"):
            file.write_bytes(data)
            yield str(data), [*usual(stock, tmp_path)[command], "--config", file]
        for field in FIELDS:
            for value in ("[[1]]", "{a: [1]}"):
                file.write_text(f"{field}: {value}\n")
                yield f"{field}: {value}", [command, "--config", file]

    assert "\n".join(wrong(cases(), fewest=60)) == ""


# ---------------------------------------------------------------- data files

TURNS: list[Any] = [
    *JUNK, [None], [1], ["x"], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}],
    [{"role": "user", "content": None}], [{"role": "assistant", "content": ""}], [{"role": "x", "content": "y"}],
    [{"role": "assistant", "content": "x", "weight": {}}], [{"role": "assistant", "content": "x", "tool_calls": 1}],
    [{"role": "assistant", "content": "a\ud83d"}], [{"role": "user", "content": [{"type": "text", "text": 1}]}],
]  # fmt: skip
LINES = [
    "", "null", "1", "[]", '"x"', "{", "{}", "{]", "NaN", '{"text": NaN}', '{"text": 1e999}', "[" * 9000,
    '{"a":' * 9000, "9" * 5000, '{"text": ' + "9" * 5000 + "}", '{"prompt": "a"}', '{"response": "a"}',
    '{"text": 1, "x": 1}',
    '{"prompt": "a", "response": " "}', '{"\\ud83d": 1}', "'a': 1", "{'text': 'a'}", "text\na b c", "\ufeff", "\0",
    *(json.dumps({"messages": turns}) for turns in TURNS),
    *(json.dumps({"text": junk}) for junk in JUNK if junk not in ("x", "9" * 5000)),
    *(json.dumps({"prompt": "a", "response": junk}) for junk in JUNK if junk not in ("x", "9" * 5000)),
    *(json.dumps({"prompt": junk, "response": "a"}) for junk in JUNK if not isinstance(junk, str)),
]  # fmt: skip


def readers(stock: Path, new: Path, data: Path, teacher: str = "teacher") -> list[list[object]]:
    """Return a command line of each command that reads a data file."""
    model = stock / teacher
    return [
        ["precompute-logits", "--teacher-model", model, "--train-data", data, "--output", new / "c",
         "--max-seq-length", 64],
        ["plan", "--teacher-model", model, "--train-data", data],
        ["train", "--train-data", data, "--teacher-model", model, "--distillation-type", "output", "--student-config",
         stock / "student.json", "--output-dir", new / "r"],
    ]  # fmt: skip


@pytest.mark.parametrize("reader", [0, 1, 2], ids=["precompute-logits", "plan", "train"])
def test_data_files(reader: int, stock: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"

    def cases() -> Iterator[Case]:
        for line in LINES:
            file.write_text(line + "\n")
            yield line[:60], readers(stock, tmp_path, file, "chat")[reader]
        for content in (b"\xff\xfe{\0", b"\x1f\x8b\x08", b"PAR1", b"\xef\xbb\xbf", b"{}" * 99):
            file.write_bytes(content)
            yield str(content), readers(stock, tmp_path, file, "chat")[reader]

    assert "\n".join(wrong(cases(), fewest=60)) == ""


def parquet_tables() -> dict[str, object]:
    """Return columns that no record kind has, by name."""
    return {
        "no rows": {"text": pyarrow.array([], pyarrow.string())},
        "nulls": {"text": [None, None]},
        "numbers": {"text": [1, 2]},
        "binary": {"text": [b"\xff"]},
        "bad UTF-8": {"text": pyarrow.array([b"\xff"]).cast(pyarrow.binary()).view(pyarrow.binary())},
        "lists": {"prompt": [["a"]], "response": [["b"]]},
        "turns of nulls": {"messages": [[{"role": None, "content": None}]]},
        "structs": {"messages": [{"role": "user"}]},
        "time": {"text": pyarrow.array([2**62], pyarrow.timestamp("ns"))},
        "decimals": {"prompt": ["a"], "response": pyarrow.array([1], pyarrow.decimal128(5))},
        "no columns": {},
    }


def test_parquet_files(stock: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"

    def cases() -> Iterator[Case]:
        for name, columns in parquet_tables().items():
            pyarrow.parquet.write_table(pyarrow.table(columns), file)
            for words in readers(stock, tmp_path, file):
                yield name, words
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a b c d"] * 200}), file)
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 20)):
            file.write_bytes(whole[:place])
            yield f"cut at {place}", readers(stock, tmp_path, file)[1]

    assert "\n".join(wrong(cases(), fewest=50)) == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["prompt", "response", "messages", "text", "role", "content", "weight", "tool_calls", "id"]
            ),
            inner | st.sampled_from(["user", "assistant", "x"]),
            max_size=4,
        )
    ),
    max_leaves=9,
)
records = st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "response", "messages", "text"), json_values))


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records | json_values)
def test_any_record(stock: Path, tmp_path: Path, record: Any) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    words = readers(stock, tmp_path, tmp_path / "data.jsonl", "chat")[1]
    assert "\n".join(wrong([("record", words)], allowed=(0, 2))) == ""
