"""Data and labels from a real vLLM server over loopback. ``just test-vllm`` runs it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM has its own environment: just setup-vllm && just test-vllm")

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.pipeline.generate_data.local_model import answer_locally
from logitcask.pipeline.generate_data.prompts import make_prompts, read_templates
from logitcask.pipeline.teachers.served.servers import Connection
from logitcask.pipeline.teachers.served.teacher import ServedTeacher, load_served_teacher
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.support.mistakes import said
from tests.support.servers import free_port
from tests.support.tiny import RECORDS, make_teacher, write_jsonl

PROMPTS, NEW_TOKENS, CONCURRENCY = 60, 24, 4
START = 240  # seconds the server may take to start


@dataclass(frozen=True)
class Served:
    """A running server and its model's folder."""

    url: str
    model: Path

    def requests(self) -> int:
        """Return the number of chat completions that ended: complete, or aborted because the client went away."""
        with urllib.request.urlopen(f"{self.url}/metrics") as page:
            text = page.read().decode()
        return int(sum(float(n) for n in re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE)))

    def settled(self) -> int:
        """Return the number of requests once none is under way."""
        before, now = -1, self.requests()
        while before != now:
            time.sleep(1)
            before, now = now, self.requests()
        return now


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    model, port = make_teacher(folder / "teacher", chat=True, width=128, max_length=256), free_port()
    options = ["--model", model, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    options += ["--dtype", "float32", "--max-model-len", 256, "--enforce-eager", "--max-num-seqs", 16]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)]
    more = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **more}, stdout=out, stderr=out, start_new_session=True)
    try:
        running, deadline = Served(f"http://127.0.0.1:{port}", model), time.monotonic() + START
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{running.url}/health"):
                break
            time.sleep(0.5)
        yield running
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def command(served: Served, folder: Path, **more: object) -> list[str]:
    """Return the command that asks all the prompts."""
    prompts = folder / "prompts.yaml"
    topics = [f"{n} apples and {70 - n} eggs" for n in range(PROMPTS)]
    prompts.write_text(f"languages: [python]\ntopics: {topics}\ncategories: {{x: ['How many are {{topic}}?']}}\n")
    values = {"provider": "openai-compatible", "base_url": f"{served.url}/v1", "model": "tiny", "prompts": prompts,
              "num_examples": PROMPTS, "max_new_tokens": NEW_TOKENS, "temperature": 0, "concurrency": CONCURRENCY,
              "output_dir": folder / "out", **more}  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "logitcask", "generate-data", *words]


def answers(folder: Path) -> list[dict[str, Any]]:
    """Return the answers in the journal's complete lines."""
    return [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_bytes().split(b"\n")[:-1]]


def test_replies_are_those_of_the_model(served: Served, tmp_path: Path) -> None:
    """Character for character what transformers generates, and the tokens it counts."""
    before = served.settled()
    subprocess.run(command(served, tmp_path), check=True)
    assert served.settled() - before == PROMPTS
    prompts = make_prompts(read_templates(tmp_path / "prompts.yaml"), PROMPTS, 0)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "dtype": "float32", "device": "cpu"}
    want = {p.id: r for b in answer_locally(str(served.model), prompts, batch_size=16, seed=0, **options) for p, r in b}
    written = {answer["id"]: answer for answer in answers(tmp_path)}
    assert written.keys() == want.keys()
    assert all(written[i]["input_tokens"] == reply.input_tokens for i, reply in want.items())
    for i, reply in want.items():
        got = written[i]
        assert (got["finish"], got["output_tokens"]) == (reply.finish, reply.output_tokens)
        # vLLM withholds the bytes of an incomplete character at the end
        assert got["response"] == reply.text.rstrip("\ufffd") or got["response"] == reply.text


def test_a_killed_run_asks_only_for_what_is_missing(served: Served, tmp_path: Path) -> None:
    before, journal = served.settled(), tmp_path / "out" / "answers.jsonl"
    for goal in (10, 30):
        with subprocess.Popen(command(served, tmp_path)) as process:
            while not journal.exists() or len(journal.read_bytes().splitlines()) < goal:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    journalled, asked = len(answers(tmp_path)), served.settled() - before
    assert 30 <= journalled < PROMPTS
    assert asked - journalled <= 2 * CONCURRENCY, "more was lost than was under way at two kills"
    subprocess.run(command(served, tmp_path), check=True)
    assert served.settled() - before - asked == PROMPTS - journalled
    assert len({answer["id"] for answer in answers(tmp_path)}) == len(answers(tmp_path)) == PROMPTS


def test_a_prompt_that_the_server_refuses_is_an_error(served: Served, tmp_path: Path) -> None:
    refused = subprocess.run(
        command(served, tmp_path, max_new_tokens=4000, num_examples=2), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "2 prompts got no reply (the last: " in said(refused.stderr)
    assert "Error code: 400" in refused.stderr


def test_a_wrong_model_is_an_error(served: Served, tmp_path: Path) -> None:
    refused = subprocess.run(command(served, tmp_path, model="big"), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "Error code: 404" in refused.stderr
    assert "big" in refused.stderr


def test_answers_come_with_the_models_labels(served: Served, tmp_path: Path) -> None:
    """Drawn at temperature 2, labelled at 1: each label is what the transformers engine makes of the same tokens."""
    more: dict[str, Any] = {"logprobs": 8, "tokenizer": served.model, "temperature": 2, "max_new_tokens": 150}
    subprocess.run(command(served, tmp_path, **more, num_examples=12, near_duplicate=1), check=True)
    reader = CacheReader(tmp_path / "out" / "train-cache")
    assert len(reader) == len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) > 1
    plain = load_teacher(str(served.model), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    for index in range(len(reader)):
        example = reader.example(index)
        text = TokenizedExample(
            index, example.input_ids, example.target_mask, np.zeros(len(example.targets), dtype=bool)
        )
        (wanted,) = plain.label([text], label_of(8)).targets
        assert (example.targets.head_ids == wanted.head_ids).mean() > 0.99
        np.testing.assert_allclose(example.targets.head_logprobs, wanted.head_logprobs, atol=0.13)  # a code's width
        np.testing.assert_allclose(example.targets.gold_logprobs, wanted.gold_logprobs, atol=0.13)


def label_of(head_size: int) -> LabelSettings:
    return LabelSettings(vocab_size=300, head_size=head_size, tail_draws=0, temperatures=[1.0], seed=0)


def teacher_of(served: Served, head_size: int) -> ServedTeacher:
    connection = Connection((f"{served.url}/v1",), 8, 60.0, 3)
    source = str(served.model)
    return load_served_teacher("tiny", connection, source, revision=None, trust_remote_code=False, head_size=head_size)


def test_labels_are_the_heads_of_the_transformers_engine(served: Served) -> None:
    """Label by label, the server's own numbers, twelve texts of up to the longest it scores."""
    random = np.random.default_rng(0)
    batch = []
    for n, length in enumerate((255, 2, *random.integers(2, 200, 10))):
        mask = (random.random(length) < 0.7) & (np.arange(length) < length - 1)
        mask[0] = True
        ids = random.integers(0, 300, length)
        batch.append(TokenizedExample(n, ids, mask, np.zeros(mask.sum(), dtype=bool)))
    label = label_of(20)
    teacher = teacher_of(served, 20)
    assert teacher.facts.max_length == 255
    plain = load_teacher(str(served.model), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    for own, others in zip(teacher.label(batch, label).targets, plain.label(batch, label).targets, strict=True):
        assert (own.head_ids == others.head_ids).mean() > 0.99  # two tokens may be equally probable
        np.testing.assert_allclose(own.head_logprobs, others.head_logprobs, atol=1e-3)
        np.testing.assert_allclose(own.gold_logprobs, others.gold_logprobs, atol=1e-3)
        np.testing.assert_allclose(np.exp(own.log_tail_mass), np.exp(others.log_tail_mass), atol=1e-4)


def test_a_head_above_the_servers_cap_is_one_line(served: Served) -> None:
    with pytest.raises(LogitcaskError, match="start vLLM with --max-logprobs 21 or more, or lower --head-size from 21"):
        teacher_of(served, 21)


def test_stage_1_runs_on_the_server(served: Served, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    values = {"engine": "server", "base_url": f"{served.url}/v1,{served.url}", "teacher_model": "tiny",
              "tokenizer": served.model, "train_data": tmp_path / "train.jsonl", "output": tmp_path / "cache",
              "shard_positions": 64}  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "logitcask", "precompute-logits", *words]
    reported = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    assert "labels    the server's: only the head at T=1, no draws, no other temperature" in reported
    assert verify(tmp_path / "cache").problems == []
