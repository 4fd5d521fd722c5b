"""Every mistake of the user is one line on stderr with the rule and the value, exit code 2, and nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from logitcask.pipeline.cli import main
from tests.support import runs
from tests.support.mistakes import said
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import RECORDS, make_cache, make_teacher

USER_TURN = {"messages": [{"role": "user", "content": "Hello"}]}


class Place(NamedTuple):
    """``stock``: teachers, data, caches, a student and a run, which no row may change; ``new``: a folder per row."""

    stock: Path
    new: Path


Prepare = Callable[[Place], list[str]]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    make_cache(folder)
    make_teacher(folder / "chat", chat=True)
    make_teacher(folder / "other", vocab_size=280)
    student = write_config(folder / "student.json", STUDENT)
    shutil.copytree(folder / "cache", folder / "incomplete")
    (folder / "incomplete" / "commits" / "c" / "1" / "0").unlink()  # its folder stays, as after a kill
    shutil.copytree(folder / "cache", folder / "newer")
    group = json.loads((folder / "newer" / "zarr.json").read_text())
    group["attributes"]["logitcask"]["format_version"] = 99
    write_config(folder / "newer" / "zarr.json", group)
    (folder / "plain").mkdir()
    (folder / "plain" / "notes.txt").write_text("no cache")
    runs.train(folder / "cache", folder / "run", student_config=student, learning_rate=5e-4, save_steps=1)
    return folder


def line(command: str, options: dict[str, object]) -> list[str]:
    """Return a command line; an option that is None is left out, one that is True is a switch."""
    words = [command]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [] if value is None else [flag] if value is True else [flag, str(value)]
    return words


def precompute(p: Place, **changes: object) -> list[str]:
    usual = {"teacher_model": p.stock / "teacher", "train_data": p.stock / "train.jsonl", "output": p.new / "out",
             "max_seq_length": 64, "device": "cpu"}  # fmt: skip
    return line("precompute-logits", {**usual, **changes})


def train(p: Place, **changes: object) -> list[str]:
    usual = {"cache": p.stock / "cache", "student_config": p.stock / "student.json", "output_dir": p.new / "out",
             "max_steps": 2, "device": "cpu"}  # fmt: skip
    return line("train", {**usual, **changes})


def stage_1(**changes: object) -> Prepare:
    """The usual stage 1 with other options."""
    return lambda p: precompute(p, **changes)


def stage_2(**changes: object) -> Prepare:
    """The usual stage 2 with other options."""
    return lambda p: train(p, **changes)


def stage_2_in(**folders: str) -> Prepare:
    """The usual stage 2 with options that name something in the stock."""
    return lambda p: train(p, **{name: p.stock / folder for name, folder in folders.items()})


def data(content: str, teacher: str = "teacher", encoding: str = "utf-8") -> Prepare:
    """Stage 1 on a data file of this content."""

    def prepare(p: Place) -> list[str]:
        (p.new / "data.jsonl").write_text(content, encoding=encoding)
        return precompute(p, train_data=p.new / "data.jsonl", teacher_model=p.stock / teacher)

    return prepare


def parquet(data: bytes) -> Prepare:
    """Stage 1 on a Parquet file of these bytes."""

    def prepare(p: Place) -> list[str]:
        (p.new / "data.parquet").write_bytes(data)
        return precompute(p, train_data=p.new / "data.parquet")

    return prepare


def flipped_parquet() -> bytes:
    """Return a Parquet file whose footer is intact and whose first page is damaged."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b c"] * 50}), sink)
    data = bytearray(sink.getvalue())
    data[4:20] = bytes(16)
    return bytes(data)


def third_line(text: str) -> Prepare:
    """Stage 1 on a data file whose third line is this."""
    good = json.dumps(RECORDS[0])
    return data(f"{good}\n{good}\n{text}\n{good}\n")


def config(content: str, encoding: str = "utf-8") -> Prepare:
    """Stage 2 with a config file of this content."""

    def prepare(p: Place) -> list[str]:
        (p.new / "run.yaml").write_text(content, encoding=encoding)
        return train(p, config=p.new / "run.yaml")

    return prepare


def student(content: str) -> Prepare:
    """Stage 2 with a student config of this content."""

    def prepare(p: Place) -> list[str]:
        (p.new / "student.json").write_text(content)
        return train(p, student_config=p.new / "student.json")

    return prepare


def changed_student(**changes: object) -> Prepare:
    """Stage 2 with the usual student config changed."""
    return student(json.dumps({**STUDENT, **changes}))


def on_a_copy(folder: str, command: Callable[..., list[str]], **options: object) -> Prepare:
    """A command whose output is a copy of something in the stock."""

    def prepare(p: Place) -> list[str]:
        shutil.copytree(p.stock / folder, p.new / "out")
        return command(p, **options)

    return prepare


def output_is_a_file(p: Place) -> list[str]:
    (p.new / "out").write_text("mine")
    return train(p)


def cache_without_draws(p: Place) -> list[str]:
    cache = make_cache(p.new, p.stock / "teacher", tail_draws=0)
    return train(p, cache=cache, tail="sampled")


def cache_without_head(p: Place) -> list[str]:
    cache = make_cache(p.new, p.stock / "teacher", head_size=0)
    return train(p, cache=cache, tail="bucket")


def source_tree(p: Place) -> list[str]:
    (p.new / "code").mkdir()
    (p.new / "code" / "a.py").write_text("x = 1\n")
    return line("generate-data", {"source_dir": p.new / "code", "output_dir": p.new / "out"})


def info(folder: str) -> Prepare:
    return lambda p: ["cache", "info", str(p.stock / folder)]


def generate(**changes: object) -> Prepare:
    return lambda p: line("generate", {"model": p.stock / "run" / "final", "prompt": "Hi", **changes})


Row = tuple[str, Prepare, tuple[str, ...]]
ROWS: list[Row] = [
    # the data
    ("data file missing", stage_1(train_data="nowhere.jsonl"), ("nowhere.jsonl", "no such data file")),
    ("data file empty", data(""), ("data.jsonl", "has no examples")),
    ("data file of blank lines", data("\n \n"), ("data.jsonl", "has no examples")),
    ("malformed JSON", third_line('{"prompt": "a", '), ("data.jsonl:3", "malformed JSON", "--on-bad-record skip")),
    ("not an object", third_line("[1]"), ("data.jsonl:3", "JSON object", "list")),
    ("not UTF-8", data('{"text": "ÿ"}', encoding="latin-1"), ("data.jsonl:1", "is not valid UTF-8")),
    ("missing field", third_line('{"prompt": "a"}'), ("data.jsonl:3", "has columns ['prompt']", "needs messages")),
    ("mistyped field", third_line('{"prompt": "a", "response": 5}'), ("data.jsonl:3", "response must be a string")),
    ("mistyped messages", third_line('{"messages": "hi"}'), ("data.jsonl:3", "messages must be a list", "str")),
    ("mistyped turn", third_line('{"messages": [5]}'), ("data.jsonl:3", "a message must be an object", "int")),
    ("empty response", third_line('{"prompt": "a", "response": " "}'), ("data.jsonl:3", "response is empty")),
    ("empty text", third_line('{"text": ""}'), ("data.jsonl:3", "no target")),
    ("chat without a template", third_line(json.dumps(USER_TURN)), ("data.jsonl:3", "no chat template")),
    ("no assistant turn", data(json.dumps(USER_TURN), "chat"), ("data.jsonl:1", "no target", "assistant turn")),
    ("unknown columns", third_line('{"q": "a", "a": "b"}'), ("data.jsonl:3", "has columns ['a', 'q']")),
    ("no Parquet", parquet(b"hello"), ("data.parquet", "damaged or not a Parquet file")),
    ("damaged Parquet", parquet(flipped_parquet()), ("data.parquet", "damaged or not a Parquet file")),
    ("all cut away", stage_1(max_seq_length=2), ("no example has a target", "--max-seq-length 2", "raise it")),
    # the label
    ("head and tail of 0", stage_1(head_size=0, tail_draws=0), ("--head-size + --tail-draws", "at least 1, got 0")),
    ("negative head size", stage_1(head_size=-1), ("--head-size", "greater than or equal to 0", "'-1'")),
    ("label over the vocabulary", stage_1(head_size=290, tail_draws=50), ("--head-size + --tail-draws", "340")),
    ("precompute at T=0", stage_1(temperatures="1,0"), ("--temperatures", "greater than 0", "'0'")),
    ("precompute at T=-1", stage_1(temperatures="-1"), ("--temperatures", "greater than 0", "'-1'")),
    ("precompute at T=nan", stage_1(temperatures="nan"), ("--temperatures", "'nan'")),
    ("precompute at T=inf", stage_1(temperatures="inf"), ("--temperatures", "'inf'")),
    ("precompute at T=warm", stage_1(temperatures="1,warm"), ("--temperatures", "valid number", "'warm'")),
    ("precompute at T twice", stage_1(temperatures="2,2.0"), ("--temperatures must differ", "[2.0, 2.0]")),
    ("no temperatures", stage_1(temperatures=""), ("--temperatures", "valid number")),
    ("batch size not a number", stage_1(batch_size="many"), ("--batch-size", "valid integer", "'many'")),
    ("batch size 0", stage_1(batch_size=0), ("--batch-size", "greater than or equal to 1", "'0'")),
    ("longer than the teacher", stage_1(max_seq_length=129), ("--max-seq-length 129", "teacher's 128", "lower it")),
    ("teacher missing", stage_1(teacher_model="./no-teacher"), ("./no-teacher", "no tokenizer could be loaded")),
    ("GGUF teacher missing", stage_1(teacher_model="no.gguf"), ("no.gguf",)),
    ("no such device", stage_1(device="warp"), ("--device warp", "no such device", "cpu")),
    ("device not here", stage_1(device="cuda:77"), ("--device cuda:77", "no such device", "cpu")),
    ("unknown dtype", stage_1(dtype="int4"), ("--dtype", "'float32'", "'int4'")),
    ("required option left out", stage_1(teacher_model=None), ("--teacher-model is required",)),
    ("devices of another engine", stage_1(engine="transformers", tensor_parallel_size=2), ("-parallel-size 2",)),
    ("devices of any engine", stage_1(tensor_parallel_size=2), ("--tensor-parallel-size 2", "auto", "--engine vllm")),
    ("check of another engine", stage_1(engine="transformers", skip_engine_check=True), ("--skip-engine-check",)),
    ("workers without Ray", stage_1(workers=2), ("--workers 2 requires --ray", "add it")),
    # the cache as output
    ("complete cache of other settings", on_a_copy("cache", precompute), ("label.head_size: cache has", "--overwrite")),
    ("other settings", on_a_copy("incomplete", precompute, head_size=4, tail_draws=8, shard_positions=64, seed=7),
     ("label.seed: cache has 0, this run has 7", "--overwrite")),
    ("output of something else", on_a_copy("plain", precompute), ("out", "not a logit cache")),
    ("overwriting something else", on_a_copy("plain", precompute, overwrite=True), ("out", "not a logit cache")),
    # the cache as input
    ("cache missing", stage_2(cache="no/cache"), ("no/cache", "no such cache", "precompute-logits")),
    ("no cache", stage_2_in(cache="plain"), ("plain", "not a logit cache")),
    ("cache is a file", stage_2_in(cache="train.jsonl"), ("train.jsonl", "not a logit cache", "folder")),
    ("newer cache", stage_2_in(cache="newer"), ("newer", "cache format 99", "upgrade")),
    ("incomplete cache", stage_2_in(cache="incomplete"), ("shards are committed", "finish it with the same")),
    ("another student's tokenizer", lambda p: train(p, student_config=None, student_model=p.stock / "other"),
     ("another tokenizer", "other", "fingerprints")),
    ("another teacher's tokenizer", stage_2_in(teacher_model="other"), ("another tokenizer", "other")),
    ("no draws", cache_without_draws, ("--tail sampled needs draws", "bucket")),
    ("no head", cache_without_head, ("--tail bucket needs a head", "sampled")),
    # training
    ("train at T=0", stage_2(temperature=0), ("--temperature", "greater than 0", "'0'")),
    ("train at T=-2", stage_2(temperature=-2), ("--temperature", "greater than 0", "'-2'")),
    ("train at T=nan", stage_2(temperature="nan"), ("--temperature", "'nan'")),
    ("temperature not stored", stage_2(temperature=3), ("--temperature 3", "not stored", "1, 1.5, 2")),
    ("alpha over 1", stage_2(alpha=1.5), ("--alpha", "less than or equal to 1", "'1.5'")),
    ("alpha below 0", stage_2(alpha=-0.1), ("--alpha", "greater than or equal to 0", "'-0.1'")),
    ("alpha nan", stage_2(alpha="nan"), ("--alpha", "'nan'")),
    ("alpha against logit", stage_2(alpha=0.3, distillation_type="logit"), ("--alpha must be 0.0", "logit", "got 0.3")),
    ("alpha against output", stage_2(alpha=0.3, distillation_type="output"), ("--alpha must be 1.0", "output", "0.3")),
    ("reverse KL without bucket", stage_2(divergence="reverse-kl"), ("reverse-kl", "tail bucket")),
    ("JSD on the bare head", stage_2(divergence="jsd", tail="renormalize"), ("jsd", "tail bucket", "renormalize")),
    ("unknown choice", stage_2(distillation_type="magic"), ("--distillation-type", "'hybrid'", "'magic'")),
    ("learning rate not a number", stage_2(learning_rate="fast"), ("--learning-rate", "valid number", "'fast'")),
    ("max steps not whole", stage_2(max_steps=1.5), ("--max-steps", "valid integer", "'1.5'")),
    ("no source", stage_2(cache=None), ("give --cache, or --train-data",)),
    ("text without a weight", stage_2_in(train_data="train.jsonl"), ("need a weight each", "sum to 1")),
    ("soft labels without a cache", stage_2(cache=None, train_data="x.jsonl"), ("hybrid needs --cache",)),
    ("text without a tokenizer", lambda p: train(p, cache=None, train_data=p.stock / "train.jsonl",
                                                 distillation_type="output"), ("tokenizer", "--teacher-model")),
    ("no such training device", stage_2(device="warp"), ("--device", "'cpu'", "'warp'")),
    ("fidelity without a cache", stage_2(cache=None, train_data="x.jsonl", teacher_model="t", min_fidelity=0.9),
     ("--min-fidelity applies to a cache",)),
    # the student
    ("no student", stage_2(student_config=None), ("exactly one of --student-config",)),
    ("two students", stage_2(student_model="x"), ("exactly one of --student-config",)),
    ("student config missing", stage_2(student_config="no.json"), ("--student-config no.json", "no such file")),
    ("student config is a folder", stage_2_in(student_config="plain"), ("--student-config", "plain", "not a readable")),
    ("student config not JSON", student("{,"), ("--student-config", "not a readable JSON file")),
    ("student config no HF config", student('{"layers": 2}'), ("--student-config", "model_type")),
    ("student config a list", student("[]"), ("--student-config", "model_type")),
    ("unknown architecture", changed_student(model_type="perceptron"), ("--student-config", "perceptron")),
    ("no causal LM", student('{"model_type": "vit"}'), ("--student-config", "no causal language model")),
    ("student cannot be built", changed_student(num_attention_heads=5), ("--student-config", "no causal")),
    ("student vocabulary too small", changed_student(vocab_size=100), ("vocabulary is 100", "300", "as large")),
    ("student too short", changed_student(max_position_embeddings=8), ("max_position_embeddings", "8")),
    ("student folder missing", stage_2(student_config=None, student_model="./no-student"), ("no-student", "no token")),
    ("layers without a teacher", stage_2(student_config=None, init_from_teacher_layers="0"), ("--teacher-model",)),
    ("layer not there", lambda p: train(p, student_config=None, init_from_teacher_layers="0,2",
                                        teacher_model=p.stock / "teacher"), ("layers are 0 to 1", "0,2")),
    ("layers not numbers", lambda p: train(p, student_config=None, init_from_teacher_layers="all",
                                           teacher_model=p.stock / "teacher"), ("layer numbers", "'all'")),
    # the output folder and resuming
    ("output folder not empty", on_a_copy("plain", train), ("--output-dir", "not an empty folder", "latest")),
    ("output is a file", output_is_a_file, ("--output-dir", "not an empty folder")),
    ("nothing to resume", stage_2(resume_from_checkpoint="latest"), ("no complete checkpoint", "start without it")),
    ("checkpoint missing", stage_2(resume_from_checkpoint="runs/x"), ("runs/x", "not a complete checkpoint")),
    ("checkpoint of another run", on_a_copy("run", train, resume_from_checkpoint="latest", learning_rate=0.1, seed=3),
     ("another run", "learning_rate: checkpoint has 0.0005, this run has 0.1",
      "seed: checkpoint has 0, this run has 3")),
    # config files
    ("unknown config key", config("batch_sise: 3\n"), ("run.yaml", "unknown key batch_sise", "batch_size")),
    ("config is a list", config("- 1\n"), ("run.yaml", "must be a mapping", "list")),
    ("config is empty", config(""), ("run.yaml", "must be a mapping", "NoneType")),
    ("config is no YAML", config("a: [\n"), ("run.yaml", "not a readable YAML file")),
    ("config is binary", config("ÿ", encoding="latin-1"), ("run.yaml", "not a readable YAML file")),
    ("config value mistyped", config("batch_size: [1]\n"), ("--batch-size", "valid integer", "[1]")),
    ("config missing", stage_2(config="no.yaml"), ("no.yaml", "no such config file")),
    # the other commands
    ("generate from nothing", generate(model="./nothing"), ("./nothing", "no tokenizer could be loaded")),
    ("generate on no device", generate(device="warp"), ("--device warp", "no such device")),
    ("generate at T=-1", generate(temperature=-1), ("--temperature", "greater than or equal to 0")),
    ("no such source", lambda p: line("generate-data", {"source_dir": "no/tree", "output_dir": p.new / "out"}),
     ("--source-dir no/tree", "no such folder")),
    ("source without functions", source_tree, ("--source-dir", "no documented Python function")),
    ("data exists", lambda p: line("generate-data", {"output_dir": p.stock}), ("train.jsonl", "already exists")),
    ("unknown provider", lambda p: line("generate-data", {"provider": "oracle", "output_dir": p.new / "out"}),
     ("--provider", "'source'", "'oracle'")),
]  # fmt: skip


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Return every path below the folders with its size and modification time."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["logitcask", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(("prepare", "fragments"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_mistake_is_three_lines_at_most(
    prepare: Prepare,
    fragments: tuple[str, ...],
    stock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = prepare(Place(stock, tmp_path))
    before = snapshot(stock, tmp_path)
    capsys.readouterr()
    caplog.clear()
    code = run(words, monkeypatch)
    out, err = capsys.readouterr()
    notices = err.partition("error: ")[0].splitlines()
    assert [line.split()[0] for line in notices] in ([], ["data"], ["data", "teacher"]), err
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert [part for part in fragments if part not in said(err)] == [], err
    assert out == ""
    assert caplog.messages == []  # the log goes to another stream than this test's stderr
    assert code == 2
    after = snapshot(stock, tmp_path)
    assert {path: after[path] for path in after if not path.name.endswith(".skipped.jsonl")} == before


def test_a_process_prints_nothing_else(stock: Path, tmp_path: Path) -> None:
    words = precompute(Place(stock, tmp_path), max_seq_length=129)  # the teacher is loaded before it is refused
    done = subprocess.run([sys.executable, "-m", "logitcask", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["data", "teacher", "error:", "fix:", "see:"]
    assert "more than the teacher's 128: lower it\n" in f"{said(done.stderr)}\n"
