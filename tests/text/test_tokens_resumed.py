"""Tokens that a killed run had written are taken by the same run again; damaged ones or those of other data are not."""

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.staging import temporary_folder
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import Raw
from logitcask.pipeline.text.tokens import log, stage
from logitcask.pipeline.text.tokens.stage import stage_tokens
from tests.support.forked import ran
from tests.support.tiny import RECORDS, folder_bytes, make_teacher, make_tokenizer, precompute_settings, write_jsonl

DATED = "{{ strftime_now('%d') }}"
DAY = datetime.date(2026, 1, 31)
DATA: list[dict[str, Any]] = [
    *(record | {"language": f"l{n % 3}", "more": 1} for n, record in enumerate(RECORDS)),
    {"prompt": "a", "response": ""},
    {"text": "and so on"},
]


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "RECORDS", 4)
    monkeypatch.setattr(log, "COMMIT_CHUNKS", 2)


def staged(folder: Path, data: list[dict[str, Any]], *, until: int = 1000, **options: Any) -> tuple[Any, ...]:
    """Return all that a run finds out, and how many records it encoded; one of ``until`` records is cut off there."""
    tokenizer, told, encoded = make_tokenizer(chat=True), list[str](), list[object]()
    tokenizer.chat_template = DATED + str(tokenizer.chat_template)
    limit = options.pop("max_seq_length", 64)
    encoder = Encoder(tokenizer, report=told.append, **{"prompt_loss": False, **options})
    outcome = Encoder.outcome

    def counted(self: Encoder, record: Any) -> Any:
        encoded.append(record)
        return outcome(self, record)

    def records(_: str) -> Iterator[Raw]:
        for number, record in enumerate(data):
            if number == until:
                raise Killed
            yield f"row {number}", record

    folder.mkdir(exist_ok=True)
    bad = BadRecords(folder.with_suffix(".bad"), 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "outcome", counted)
        table = stage_tokens(encoder, ("data",), folder, bad=bad, max_seq_length=limit, records=records, resumable=True)
    examples = [(e.input_ids.tolist(), e.target_mask.tolist()) for e in map(table.example, range(len(table)))]
    codes = {name: values.tolist() for name, values in table.codes.items()}
    found = (table.identity, codes, examples, table.starts.tolist(), table.positions.tolist(), encoder.notices, told)
    return *found, folder.with_suffix(".bad").read_text(), len(encoded)


def killed(folder: Path) -> None:
    """Leave what a run leaves that fails at the 22nd record on ``DAY``: 5 chunks are durable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logitcask.pipeline.text.examples.datetime", Clock(DAY))
        with pytest.raises(Killed):
            staged(folder, DATA, until=22)


class Clock:
    """The datetime module on a given day."""

    def __init__(self, day: datetime.date) -> None:
        self._day = day

    @property
    def date(self) -> Any:
        return type("date", (datetime.date,), {"today": classmethod(lambda _: self._day)})

    def __getattr__(self, name: str) -> Any:
        return getattr(datetime, name)


def test_a_killed_run_is_continued_on_its_day(tmp_path: Path) -> None:
    whole = staged(tmp_path / "whole", DATA, day=DAY)
    assert whole[-1] == len(DATA)
    killed(tmp_path / "cut")
    assert len((tmp_path / "cut/ledger").read_bytes().splitlines()) == 6
    again = staged(tmp_path / "cut", DATA)
    assert (again[:-1], again[-1]) == (whole[:-1], len(DATA) - 20)
    third = staged(tmp_path / "cut", DATA)  # its labelling was killed
    assert (third[:-1], third[-1]) == (whole[:-1], 0)


@pytest.mark.parametrize("harm", ["a flipped byte", "a torn file", "a torn ledger", "another record", "fewer records"])
def test_what_is_damaged_or_of_other_data_is_encoded_again(harm: str, tmp_path: Path) -> None:
    data, folder = list(DATA), tmp_path / "cut"
    killed(folder)
    tokens, ledger = (folder / name for name in ("tokens", "ledger"))
    if harm == "a flipped byte":
        content = bytearray(tokens.read_bytes())
        content[len(content) // 2] ^= 1
        tokens.write_bytes(content)
    elif harm == "a torn file":
        os.truncate(tokens, tokens.stat().st_size // 3)
    elif harm == "a torn ledger":
        os.truncate(ledger, ledger.stat().st_size - 9)
    elif harm == "another record":
        data[9] = {"prompt": "another", "response": "one"}
    else:
        data = [*data[:5], DATA[-2]]
    whole = staged(tmp_path / "whole", data, day=DAY)
    again = staged(folder, data)
    assert again[:-1] == whole[:-1]
    assert 0 < again[-1] < len(data)
    assert tokens.read_bytes() == (tmp_path / "whole/tokens").read_bytes()
    assert staged(folder, data)[:-1] == whole[:-1]


@pytest.mark.parametrize(
    "options",
    [
        {"max_seq_length": 32},
        {"prompt_loss": True},
        {"turns": "each"},
        {"columns": {"other": "system"}},
        {"day": datetime.date(2026, 2, 1)},
    ],
)
def test_tokens_of_other_settings_are_not_taken(options: dict[str, Any], tmp_path: Path) -> None:
    killed(tmp_path / "cut")
    assert staged(tmp_path / "cut", DATA, **options)[-1] == len(DATA)


def test_small_data_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "COMMIT_CHUNKS", 64)
    staged(tmp_path / "whole", DATA)
    assert [file.name for file in (tmp_path / "whole").iterdir()] == ["tokens"]


def test_stage_1_goes_on_after_it_failed_and_removes_all_at_the_end(tmp_path: Path) -> None:
    """In the same cache as a run without failure, byte by byte; a part, and a cache at a URL, likewise."""
    teacher = make_teacher(tmp_path / "teacher")
    (teacher / "model.safetensors").rename(tmp_path / "weights")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    settings = precompute_settings(tmp_path)
    for part, staging in ((None, ".cache.staging"), ("1/1", ".cache.staging/1-of-1")):
        with pytest.raises(LogitcaskError, match="no causal language model"):
            precompute(settings.model_copy(update={"shards": part}))
        assert (tmp_path / staging / "ledger").exists()
    (tmp_path / "weights").rename(teacher / "model.safetensors")
    began = (tmp_path / ".cache.staging/tokens").stat().st_ino
    assert began
    precompute(settings)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "cache.files.json", "teacher", "train.jsonl"]
    other = precompute_settings(tmp_path, output=tmp_path / "other")
    precompute(other)
    assert folder_bytes(tmp_path / "cache") == folder_bytes(tmp_path / "other")


def test_temporary_folders_have_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = list[Path]()

    def fail() -> None:
        with temporary_folder("run") as first, temporary_folder("run") as second, temporary_folder("other") as third:
            folders.extend([first, second, third])
            for name in ("ledger", "tokens"):
                (first / name).write_text("y")
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert len(set(folders)) == 3
    with temporary_folder("run") as again:
        assert again == folders[0]
        assert (again / "tokens").read_text() == "y"
    assert not list(tmp_path.iterdir())
    with temporary_folder("run") as first:
        pass
    first.parent.mkdir(mode=0o755)
    with temporary_folder("run") as second:
        assert second != first, "others may have written there"


def test_train_on_text_goes_on_after_a_kill(tmp_path: Path) -> None:
    """In a process that is killed right after a piece became durable; its student is that of a run without a kill."""
    make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    program = (
        "import os, signal, sys, tempfile; from logitcask.pipeline.text.tokens import log, stage\n"
        "tempfile.tempdir = None  # a fork has that of the process it is one of\n"
        "stage.RECORDS, log.COMMIT_CHUNKS, commit, encode = 4, 2, log.TokenLog._commit, stage.ChunkEncoder.encode\n"
        "def encoded(self, records):\n"
        "    print(len(records), file=sys.stderr)\n"
        "    return encode(self, records)\n"
        "def committed(self):\n"
        "    commit(self)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.ChunkEncoder.encode = encoded\n"
        "if sys.argv.pop(1) == 'kill': log.TokenLog._commit = committed\n"
        "from logitcask.pipeline.cli import main; main()\n"
    )
    (tmp_path / "program.py").write_text(program)
    options = ["train", "--train-data", tmp_path / "train.jsonl", "--distillation-type", "output", "--student-model",
               tmp_path / "teacher", "--device", "cpu", "--max-steps", 1, "--batch-size", 2,
               "--output-dir", tmp_path / "out"]  # fmt: skip
    (tmp_path / "tmp").mkdir()
    counts = []
    for mode in ("kill", "run"):
        run = ran(tmp_path, [mode, *options], [{"TMPDIR": str(tmp_path / "tmp")}], module=f"{tmp_path}/program.py")
        assert run.returncode == (-9 if mode == "kill" else 0), run.stderr
        counts.append(run.stderr.splitlines().count("4"))
        assert bool(list((tmp_path / "tmp").rglob("ledger"))) == (mode == "kill")
    assert counts == [2, 4]
    assert not list((tmp_path / "tmp").glob("logitcask*"))
