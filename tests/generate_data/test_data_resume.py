"""Runs that are killed, interrupted, out of disk space, or in the wrong folder: nothing is paid for twice."""

import json
import os
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from tests.support.mistakes import said
from tests.support.model_server import (
    ModelServer,
    command,
    generate,
    model_server_with_keys,
    options,
    records,
)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server_with_keys() as running:
        yield running


@pytest.mark.parametrize(
    "provider",
    ["openai-compatible", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("openai", "anthropic"))],
)
def test_a_killed_run_is_finished_and_nothing_is_paid_for_twice(
    provider: str, server: ModelServer, tmp_path: Path
) -> None:
    server.delay = 0.05
    values, concurrency = options(server, tmp_path, 80, provider), 4
    journal, in_flight = tmp_path / "out" / "answers.jsonl", Counter[str]()
    for goal in (20, 45, 65):
        with subprocess.Popen([*command(values), "--concurrency", str(concurrency)]) as process:
            deadline = time.monotonic() + 60
            while len(server.asked) < goal:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        time.sleep(0.2)  # requests under way at the server end
        lines = journal.read_bytes().split(b"\n")[:-1]
        lost = set(server.asked) - {json.loads(line)["prompt"] for line in lines}
        assert len(lost) <= concurrency
        in_flight += Counter(lost)
    finished = subprocess.run(command(values), capture_output=True, text=True, check=True)
    assert "80 examples" in finished.stdout
    assert Counter(server.asked) - Counter(set(server.asked)) == in_flight
    assert len(set(server.asked)) == 80
    os.rename(tmp_path / "out", tmp_path / "killed")
    generate(server, tmp_path, 80, provider)
    for name in ("train.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_an_interrupt_ends_with_130_and_keeps_the_answers(server: ModelServer, tmp_path: Path) -> None:
    server.delay = 0.25
    words = [*command(options(server, tmp_path, 80)), "--concurrency", "4"]  # five seconds in all

    def accept_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored if these tests run as a background job

    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=accept_interrupts) as process:  # noqa: PLW1509
        while len(server.asked) < 30 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = len((tmp_path / "out" / "answers.jsonl").read_bytes().splitlines())
    assert kept >= 20
    generate(server, tmp_path, 80)
    assert len(server.asked) <= 80 + 8


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(server: ModelServer, tmp_path: Path) -> None:
    values = options(server, tmp_path, 80)

    def no_more_than_a_few_answers() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    full = subprocess.run(
        command(values), capture_output=True, text=True, check=False, preexec_fn=no_more_than_a_few_answers
    )
    assert full.returncode == 2
    assert "File too large" in said(full.stderr)
    before = Counter(server.asked)
    generate(server, tmp_path, 80)
    assert len((tmp_path / "out" / "answers.jsonl").read_bytes()[:4000].splitlines()) > 5
    assert len(server.asked) - 80 <= 8 < sum(before.values())
    assert len(records(tmp_path)) == 80


def test_more_examples_leave_the_earlier_ones_in_place(server: ModelServer, tmp_path: Path) -> None:
    generate(server, tmp_path, 40, validation_fraction=0.3)
    before = {name: records(tmp_path, name) for name in ("train", "validation")}
    assert 3 < len(before["validation"]) < 25
    generate(server, tmp_path, 80, validation_fraction=0.3)
    assert Counter(server.asked) == dict.fromkeys(server.asked, 1)
    for name, earlier in before.items():
        assert records(tmp_path, name)[: len(earlier)] == earlier
    assert len(records(tmp_path)) + len(records(tmp_path, "validation")) == 80


def test_other_settings_need_another_folder(server: ModelServer, tmp_path: Path) -> None:
    generate(server, tmp_path, 3, temperature=0.5)
    with pytest.raises(LogitcaskError) as raised:
        generate(server, tmp_path, 3, model="n", max_new_tokens=5)
    assert "max_new_tokens: folder has 1024, this run has 5; model: folder has 'm', this run has 'n'" in str(
        raised.value
    )
    assert "temperature: folder has 0.5, this run has None" in str(raised.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text("mine\n")
    with pytest.raises(LogitcaskError, match="already exists"):
        generate(server, tmp_path, 3, output_dir=tmp_path / "other")
    assert (tmp_path / "other" / "train.jsonl").read_text() == "mine\n"
    (tmp_path / "out" / "manifest.json").write_text("[]")
    with pytest.raises(LogitcaskError, match="not a manifest"):
        generate(server, tmp_path, 3)


def test_a_run_killed_before_its_first_answer_starts_over(server: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.jsonl").touch()
    generate(server, tmp_path, 3)
    assert len(records(tmp_path)) == 3
