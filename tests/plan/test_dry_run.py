"""precompute-logits --dry-run: its counts equal those of the cache made afterwards, and no weights are read."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cli import main
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.plan.dry_run import DryRun, dry_run
from logitcask.pipeline.plan.plan import plan_cache
from logitcask.pipeline.plan.show import print_examples
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size
from tests.support.mistakes import said
from tests.support.tiny import RECORDS, make_teacher, precompute_settings, write_jsonl

CUT = 20  # tokens: some examples are longer, and some keep no target


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_teacher(tmp_path / "teacher")
    no_target_left: dict[str, object] = {"prompt": "many more words " * 20, "response": "x"}
    write_jsonl(tmp_path / "train.jsonl", [*RECORDS, no_target_left])
    return tmp_path


def test_the_counts_equal_those_of_the_cache(place: Path) -> None:
    settings = precompute_settings(place, max_seq_length=CUT)
    report = dry_run(settings)
    assert not (place / "cache").exists()
    manifest = precompute(settings).manifest
    for name in ("examples", "tokens", "positions", "truncated", "dropped"):
        assert getattr(report, name) == getattr(manifest.data, name) > 0, name
    assert report.shards == manifest.shards.count > 1
    lengths = CacheReader(place / "cache").counts("token_count", range(manifest.shards.count))
    assert report.lengths == {
        0: lengths.min(),
        50: np.sort(lengths)[(len(lengths) - 1) // 2],
        90: np.sort(lengths)[int(np.ceil(0.9 * len(lengths))) - 1],
        99: lengths.max(),
        100: lengths.max(),
    }


def test_bytes_equal_the_plans_and_scale_with_the_label(place: Path) -> None:
    standard = dry_run(precompute_settings(place, head_size=8, tail_draws=24))
    tokenizer = load_tokenizer(str(place / "teacher"))
    amount = Amount(standard.examples, standard.tokens, standard.positions)
    _, parts = plan_cache("standard", amount, tokenizer_size(tokenizer), tokenizer, standard.shards)
    assert standard.cache_bytes == parts
    other = dry_run(precompute_settings(place, head_size=16, tail_draws=12, temperatures=(1.0,), fidelity_positions=0))
    for name, factor in {"head_ids": 2, "tail_ids": 0.5, "log_tail_odds": 1 / 3, "input_ids": 1, "fidelity": 0}.items():
        assert other.cache_bytes[name] == pytest.approx(factor * parts[name]), name
    assert "in proportion to those of preset standard" in other.assumed[0]
    assert not any("proportion" in line for line in standard.assumed)


def test_the_command_reads_no_weights_and_writes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "teacher" / "model.safetensors").unlink()
    before = sorted(place.rglob("*"))
    words = ["--teacher-model", place / "teacher", "--train-data", place / "train.jsonl", "--output", place / "cache",
             "--max-seq-length", CUT, "--dry-run"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["logitcask", "precompute-logits", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    out = capsys.readouterr().out
    for word in (
        "25 prompt and response",
        "24 examples",
        "examples at 20 tokens, 1 dropped",
        "bytes per target position",
        "H100 ",
        "2-core-CPU ",
    ):
        assert word in out
    assert sorted(place.rglob("*")) == before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    report = dry_run(precompute_settings(place, max_seq_length=CUT, head_size=8, tail_draws=24, batch_size=8,
                                         shard_positions=65536))  # fmt: skip
    assert DryRun.model_validate_json(capsys.readouterr().out) == report
    assert sorted(place.rglob("*")) == before


def test_json_and_show_require_a_dry_run(place: Path) -> None:
    with pytest.raises(ValidationError, match="--json requires --dry-run"):
        precompute_settings(place, json_=True)
    with pytest.raises(ValidationError, match="--show requires --dry-run"):
        precompute_settings(place, show=3)


USER, ANSWER = {"role": "user", "content": "Which \x1b[31mfruit?"}, {"role": "assistant", "content": "Two\nor three."}
SHAPES: list[dict[str, object]] = [
    {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "No."}]},
    {"prompt": "a", "response": ""},
    {"prompt": "a", "response": "b"},
    {"text": "some text"},
    {"prompt": 3, "response": "b"},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
    {"prompt": "many more words " * 20, "response": "x"},
]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    make_teacher(tmp_path / "teacher", chat=True)
    write_jsonl(tmp_path / "train.jsonl", SHAPES)
    return tmp_path


def test_every_shape_is_counted_and_shown(shapes: Path) -> None:
    options: dict[str, Any] = {
        "dry_run": True,
        "show": 99,
        "on_bad_record": "skip",
        "max_bad": 0.5,
        "chat_turns": "each",
        "max_seq_length": 128,
    }
    report = dry_run(precompute_settings(shapes, **options))
    assert report.records == {
        "chats, one example per turn": 1, "prompt and response": 2, "text": 1, "token ids": 1,
    }  # fmt: skip
    assert report.made == {**report.records, "chats, one example per turn": 2}
    assert report.bad == {"response is empty: a response needs text": 1, "prompt must be a string, got int": 1}
    assert [(example.where.rsplit(":", 1)[1], example.truncated) for example in report.shown] == [
        ("1", False), ("1", False), ("3", False), ("4", False), ("6", False), ("7", True),
    ]  # fmt: skip
    assert sum(example.targets for example in report.shown) == report.positions
    assert [[piece.text for piece in example.pieces if piece.target] for example in report.shown] == [
        ["Two\nor three.<|im_end|>"], ["No.<|im_end|>"], ["b<|im_end|>"], ["ome text<|im_end|>"], ["$", "&"], [],
    ]  # fmt: skip
    assert report.shown[1].pieces[0].text.endswith("Two\nor three.<|im_end|>\n<|im_start|>user\nWhich \x1b[31mfruit?"
                                                   "<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
    assert len(dry_run(precompute_settings(shapes, **{**options, "show": 3})).shown) == 3


def test_targets_are_coloured_on_a_terminal_and_marked_elsewhere(shapes: Path) -> None:
    shown = dry_run(precompute_settings(shapes, dry_run=True, show=1, on_bad_record="skip", max_bad=1.0)).shown
    plain, coloured = io.StringIO(), io.StringIO()
    print_examples(Console(file=plain, width=60), shown)
    assert "«Two\nor three.<|im_end|>»\n<|im_start|>user" in plain.getvalue()
    assert "Which \\x1b[31mfruit?" in plain.getvalue(), "data cannot send a terminal its own colours"
    print_examples(Console(file=coloured, width=60, force_terminal=True, color_system="standard"), shown)
    assert "\x1b[30;42mTwo⏎\x1b[0m\n\x1b[30;42mor three.<|im_end|>\x1b[0m\n" in coloured.getvalue()
    assert "\x1b[31m" not in coloured.getvalue()


def test_bad_records_are_counted_before_they_end_the_command(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher-model", shapes / "teacher", "--train-data", shapes / "train.jsonl", "--output",
             shapes / "cache", "--dry-run", "--show", 1]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["logitcask", "precompute-logits", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 2
    for part in ("1 prompt must be a string, got int", "2 prompt and response", "1 text", "«Two"):
        assert part in said.out
    assert "2 bad records of 7: 1 x response is empty" in said.err
    write_jsonl(shapes / "train.jsonl", SHAPES[1:2])
    with pytest.raises(SystemExit):
        main()
    assert "1 bad records of 1: 1 x response is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"--teacher-model": "none"}, "no model config"), ({"--train-data": "none.jsonl"}, "none.jsonl")],
)
def test_bad_input_is_one_line(
    changes: dict[str, str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = {"--teacher-model": place / "teacher", "--train-data": place / "train.jsonl", "--output": place / "cache"}
    words = [str(word) for pair in (usual | changes).items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["logitcask", "precompute-logits", *words, "--dry-run"])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said(err)
