"""Several processes that encode give what one gives, and end with a line when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import Raw
from logitcask.pipeline.text.tokens import stage
from logitcask.pipeline.text.tokens.stage import stage_tokens
from logitcask.pipeline.text.tokens.workers import processes
from tests.support.tiny import RECORDS, folder_bytes, make_teacher, make_tokenizer, precompute_settings, write_jsonl

DATED = "{{ strftime_now('%Y') }}"
MIXED: list[dict[str, Any]] = [
    *(record | {"category": f"c{n % 3}", "language": "en"} for n, record in enumerate(RECORDS)),
    {"prompt": "a", "response": None},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}] * 3, "source": "web"},
    {"messages": [{"role": "user", "content": "hi"}], "kept": 1},
    {"prompt": "long " * 60, "response": "cut away"},
    {"text": ""},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7]},
    *({"text": f"plain {n}", "language": "fr"} for n in range(30)),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ALONE", 4)
    monkeypatch.setattr(stage, "RECORDS", 4)


def staged(folder: Path, source: Path, count: int) -> tuple[Any, ...]:
    """Return all that is known of a table, and what was told, for ``count`` processes."""
    tokenizer, told = make_tokenizer(chat=True), list[str]()
    tokenizer.chat_template = DATED + str(tokenizer.chat_template)
    encoder = Encoder(tokenizer, prompt_loss=False, report=told.append)
    folder.mkdir()
    bad, sources = BadRecords(folder / "bad.jsonl", 0.5), (str(source), str(source))
    table = stage_tokens(encoder, sources, folder, bad=bad, max_seq_length=64, workers=processes(count))
    codes = {name: values.tolist() for name, values in table.codes.items()}
    return table.identity, codes, encoder.notices, told, bad.read, bad.count, folder_bytes(folder)


def test_any_number_of_processes_gives_the_same_table_notices_and_bad_records(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", MIXED)
    one = staged(tmp_path / "1", tmp_path / "data.jsonl", 1)
    assert one[3], "nothing was told"
    assert (one[4], one[5]) == (2 * len(MIXED), 8)
    assert len(one[1]) == 2
    for count in (2, 3):
        assert staged(tmp_path / str(count), tmp_path / "data.jsonl", count) == one


def test_a_cache_made_with_workers_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    started, popen = list[object](), subprocess.Popen

    def spy(*words: Any, **options: Any) -> Any:
        started.append(words)
        return popen(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    for count, expected in ((1, 0), (2, 2)):
        settings = precompute_settings(
            tmp_path, teacher_model=str(teacher), output=tmp_path / str(count), tokenize_workers=count
        )
        precompute(settings)
        assert len(started) == expected
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")


def test_an_error_of_reading_comes_after_the_records_before_it(tmp_path: Path) -> None:
    """What cannot be sent to another process is encoded in this one."""
    tokenizer = make_tokenizer()

    def records(_: str) -> Iterator[Raw]:
        for n in range(21):
            yield str(n), {"text": "" if n == 19 else f"text {n}", "language": "en", "other": open if n == 9 else None}
            if n == 14:
                yield "14", {"text": "a", "lock": threading.Lock()}
        raise LogitcaskError("the file ends here")

    encoder, bad = Encoder(tokenizer, prompt_loss=False), BadRecords(tmp_path / "bad.jsonl")
    with pytest.raises(LogitcaskError, match="the file ends here"):
        stage_tokens(encoder, ("data",), tmp_path, bad=bad, max_seq_length=64, records=records, workers=processes(2))
    assert (tmp_path / "tokens").stat().st_size > 21 * 13
    assert json.loads((tmp_path / "bad.jsonl").read_text())["where"] == "19"


def test_a_worker_that_dies_ends_the_run_with_one_line_and_no_worker_is_left(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, prompt_loss=False)

    def records(_: str) -> Iterator[Raw]:
        for n in range(10**6):
            yield str(n), {"text": f"text {n}"}
            if n == 40:
                children = _children()
                assert len(children) == 2
                os.kill(children[0], signal.SIGKILL)

    with pytest.raises(LogitcaskError, match=r"a process that tokenizes ended.*--tokenize-workers 1"):
        stage_tokens(
            encoder, ("data",), tmp_path, bad=BadRecords(None), max_seq_length=64, records=records, workers=processes(2)
        )
    assert not _children()


def test_workers_end_when_the_run_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from logitcask.pipeline.text.tokens import stage\n"
        "from logitcask.pipeline.text.bad_records import BadRecords\n"
        "from logitcask.pipeline.text.examples import Encoder\n"
        "from logitcask.pipeline.text.tokenizer import load_tokenizer\n"
        "from logitcask.pipeline.text.tokens.workers import processes\n"
        "stage.ALONE, stage.RECORDS = 0, 4\n"
        "def records(source):\n"
        "    for n in range(10**9):\n"
        "        yield str(n), {'text': f'text {n}'}\n"
        "        if n == 100: print('going', flush=True)\n"
        "stage.stage_tokens(Encoder(load_tokenizer(sys.argv[1]), prompt_loss=False), ('data',), Path(sys.argv[1]),\n"
        "    bad=BadRecords(None), max_seq_length=64, records=records, workers=processes(2))\n"
    )
    make_tokenizer().save_pretrained(tmp_path)
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "going\n"
    children = _children(run.pid)
    assert len(children) == 2
    run.kill()
    run.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def _children(parent: int | None = None) -> list[int]:
    tasks = Path(f"/proc/{parent or os.getpid()}/task").iterdir()
    found = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    return [child for child in found if b"tokens.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]
