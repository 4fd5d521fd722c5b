"""Data from models behind an API: what is sent, what is asked again, what it costs, what is written."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache.errors import LogitcaskError
from pipeline.data_generation import apis, asking
from pipeline.data_generation.prompts import make_prompts, read_templates
from pipeline.data_generation.run import generate_data
from pipeline.data_settings import GenerateDataSettings
from pipeline.examples import Encoder, read_records
from pipeline.settings import resolve
from tests.model_server import OUTPUT_TOKENS, ModelServer, model_server
from tests.tiny import folder_bytes, make_tokenizer

KEY = "sk-a-secret-of-ours"
PROVIDERS = ("openai", "anthropic", "openai-compatible")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    with model_server() as found:
        for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_COMPATIBLE_API_KEY"):
            monkeypatch.setenv(name, KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", f"{found.url}/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", found.url)
        yield found


def options(
    server: ModelServer, folder: Path, prompts: int, provider: str = "openai", **more: object
) -> dict[str, Any]:
    """Options that ask ``prompts`` prompts."""
    path = folder / "prompts.yaml"
    topics = [f"word{n}" for n in range(40)]
    path.write_text(f"languages: [python, go]\ntopics: {topics}\ncategories: {{a: ['{{language}} {{topic}}']}}\n")
    values = {"provider": provider, "model": "m", "prompts": path, "output_dir": folder / "out"}
    if provider == "openai-compatible":
        values["base_url"] = f"{server.url}/v1"
    return {**values, "num_examples": prompts, "validation_fraction": 0, **more}


def generate(server: ModelServer, folder: Path, prompts: int, provider: str = "openai", **more: Any) -> str:
    return generate_data(resolve(GenerateDataSettings, None, options(server, folder, prompts, provider, **more)))


def records(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "manifest.json").read_text())
    return found


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_prompt_is_asked_once_and_becomes_an_example(provider: str, server: ModelServer, tmp_path: Path) -> None:
    more = {} if provider == "anthropic" else {"temperature": 0.5}
    said = generate(server, tmp_path, 20, provider, max_new_tokens=77, **more)
    assert max(Counter(server.asked).values()) == 1
    found = records(tmp_path)
    assert sorted(record["prompt"] for record in found) == sorted(server.asked)
    assert [record["prompt"] for record in found] == [p.text for p in make_prompts(
        read_templates(tmp_path / "prompts.yaml"), 20, 0)]  # fmt: skip
    for where, record in read_records(str(tmp_path / "out" / "train.jsonl")):
        assert record["response"] == server.reply(record["prompt"])
        assert Encoder(make_tokenizer(), prompt_loss=False).encode(where, record).target_mask.any()
    limit = "max_completion_tokens" if provider == "openai" else "max_tokens"
    turn = [{"role": "user", "content": server.asked[0]}]
    assert server.bodies[0] == {"model": "m", "messages": turn, limit: 77, **more}
    assert "20 examples" in said
    assert "cost not known: no price of m, give it with --prices m=INPUT/OUTPUT" in said
    assert manifest(tmp_path)["counts"]["answered"] == 20
    assert manifest(tmp_path)["dollars"] is None


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_key_goes_to_the_server_and_nowhere_else(
    provider: str, server: ModelServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = {"go word1": ["400"], "go word2": ["500"]}
    with pytest.raises(LogitcaskError, match=r"1 prompts got no reply.*Error code: 400.*Bearer \[key\]") as told:
        generate(server, tmp_path, 80, provider)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    error: BaseException | None = told.value
    while error is not None:
        assert KEY not in repr(error)
        error = error.__cause__ or error.__context__
    assert KEY not in "".join(capfd.readouterr())
    assert all(KEY.encode() not in data for data in folder_bytes(tmp_path).values())


def test_what_is_openais_does_not_go_to_another_server(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_COMPATIBLE_API_KEY")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    generate(server, tmp_path, 3, "openai-compatible")
    assert all(KEY not in value for headers in server.headers for value in headers.values())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_passing_faults_are_asked_again(provider: str, server: ModelServer, tmp_path: Path) -> None:
    faults = {f"go word{n}": [fault] for n, fault in enumerate(("500", "529", "cut", "timeout", "429"))}
    server.faults = {prompt: list(of) for prompt, of in faults.items()}
    generate(server, tmp_path, 80, provider, concurrency=40, request_timeout=3)
    assert Counter(server.asked) == {
        f"{lang} word{n}": 1 for lang in ("go", "python") for n in range(40)
    } | dict.fromkeys(faults, 2)
    assert len(records(tmp_path)) == 80
    first, second = (at for at, prompt in zip(server.at, server.asked, strict=True) if prompt == "go word4")
    assert second - first >= 1, "retry-after was not honoured"


def test_no_more_than_the_retries_and_no_longer_than_is_sensible(server: ModelServer, tmp_path: Path) -> None:
    server.faults, server.retry_after = {"go word1": ["500"] * 3, "go word2": ["429"]}, "3600"
    with pytest.raises(LogitcaskError, match="2 prompts got no reply"):
        generate(server, tmp_path, 80, max_retries=1)
    assert server.asked.count("go word1") == 2
    assert server.asked.count("go word2") == 1, "an hour is not waited for"


def test_a_wait_of_an_hour_ends_in_time(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anthropic's package waits as long as it is told to."""
    monkeypatch.setattr(apis, "LONGEST_WAIT", 1.0)
    server.faults, server.retry_after = {"go word2": ["429"]}, "3600"
    began = time.monotonic()
    with pytest.raises(LogitcaskError, match=r"1 prompts got no reply .*no reply in time"):
        generate(server, tmp_path, 80, "anthropic", max_retries=1, request_timeout=1)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fault", ["garbage", "html", "shapeless"])
def test_what_got_no_reply_is_asked_by_the_next_run(
    fault: str, provider: str, server: ModelServer, tmp_path: Path
) -> None:
    server.faults = {"go word1": [fault]}
    with pytest.raises(LogitcaskError, match=r"1 prompts got no reply .*malformed.* 1 of 80 are open"):
        generate(server, tmp_path, 80, provider)
    assert len(records(tmp_path)) == 79
    assert manifest(tmp_path)["counts"]["failed"] == 1
    generate(server, tmp_path, 80, provider)
    assert Counter(server.asked).most_common(2) == [("go word1", 2), (server.asked[0], 1)]
    assert len(records(tmp_path)) == 80


@pytest.mark.parametrize("provider", PROVIDERS)
def test_paid_for_but_useless_replies_are_dropped_and_not_asked_again(
    provider: str, server: ModelServer, tmp_path: Path
) -> None:
    server.faults = {f"go word{n}": [fault] for n, fault in enumerate(("empty", "length", "refusal"))}
    server.replies = {"python word1": "```python\ndef f(:\n```", "python word2": server.reply("python word3") + "\n"}
    said = generate(server, tmp_path, 80, provider, prices="m=1/2")
    assert "dropped: 1 duplicate, 1 empty, 1 length, 1 refusal, 1 syntax" in said
    assert manifest(tmp_path)["counts"]["dropped"] == dict.fromkeys(
        ("duplicate", "empty", "length", "refusal", "syntax"), 1
    )
    assert len(records(tmp_path)) == 75
    before = folder_bytes(tmp_path / "out")
    assert generate(server, tmp_path, 80, provider, prices="m=1/2") == said
    assert len(server.asked) == 80
    assert folder_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("status", ["401", "404"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_wrong_key_or_model_stops_the_run(status: str, provider: str, server: ModelServer, tmp_path: Path) -> None:
    server.always = status
    with pytest.raises(LogitcaskError, match=f"Error code: {status}"):
        generate(server, tmp_path, 80, provider, concurrency=3)
    assert len(server.asked) <= 3


def test_a_server_that_is_down_is_not_asked_for_ever(server: ModelServer, tmp_path: Path) -> None:
    server.always = "500"
    with pytest.raises(LogitcaskError, match=f"{asking.HOPELESS} prompts got no reply"):
        generate(server, tmp_path, 80, concurrency=1, max_retries=0)
    assert len(server.asked) == asking.HOPELESS
    assert manifest(tmp_path)["stopped"] == "failures"


def test_scattered_failures_do_not_stop_a_run(server: ModelServer, tmp_path: Path) -> None:
    server.faults = {f"go word{n}": ["500"] for n in range(2 * asking.HOPELESS)}
    with pytest.raises(LogitcaskError, match=f"{2 * asking.HOPELESS} prompts got no reply"):
        generate(server, tmp_path, 80, concurrency=1, max_retries=0)
    assert len(server.asked) == 80


def test_no_server_at_all(server: ModelServer, tmp_path: Path) -> None:
    values = options(server, tmp_path, 20, "openai-compatible", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(LogitcaskError, match="no connection"):
        generate_data(resolve(GenerateDataSettings, None, values))


def test_so_many_at_once_and_no_more(server: ModelServer, tmp_path: Path) -> None:
    server.delay = 0.05
    generate(server, tmp_path, 40, concurrency=5)
    assert server.most_running == 5


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_cost_stays_within_its_limit(concurrency: int, server: ModelServer, tmp_path: Path) -> None:
    """Every reply costs (100 · 100 + 50 · 200) / 10^6 = 0.02 dollars, and may cost up to 0.0365 + what its bytes do."""
    server.delay = 0.01
    price: dict[str, Any] = {
        "prices": "other=9/9,m=100/200",
        "max_new_tokens": OUTPUT_TOKENS,
        "concurrency": concurrency,
    }
    said = generate(server, tmp_path, 60, max_cost=0.5, **price)
    found = manifest(tmp_path)
    assert found["dollars"] == pytest.approx(0.02 * len(server.asked))
    assert 0.44 < found["dollars"] <= 0.5
    assert found["stopped"] == "max-cost"
    assert f"{60 - len(server.asked)} of 60 prompts are open" in said
    asked = len(server.asked)
    generate(server, tmp_path, 60, max_cost=0.5, **price)
    assert len(server.asked) == asked, "the limit is of the folder, not of a run"
    assert "stopped" not in generate(server, tmp_path, 60, max_cost=5, **price)
    assert Counter(server.asked) == dict.fromkeys(server.asked, 1)
    assert len(records(tmp_path)) == 60


def test_dear_replies_under_way_count(server: ModelServer, tmp_path: Path) -> None:
    """Twenty requests at once, each of which may cost a dollar and does not tell: two dollars are two requests."""
    server.always = "untold"
    said = generate(server, tmp_path, 40, max_cost=2.2, prices="m=0/1000", max_new_tokens=1000, concurrency=20)
    assert len(server.asked) == 2
    assert manifest(tmp_path)["dollars"] == 2
    assert "2 answers tell no tokens and count as the most they can cost" in said


def test_timeouts_may_have_cost_and_refusals_of_the_server_have_not(server: ModelServer, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "max_cost": 2.2,
        "prices": "m=0/1000",
        "max_new_tokens": 1000,
        "concurrency": 1,
        "max_retries": 0,
    }
    server.always = "timeout"
    with pytest.raises(LogitcaskError, match=r"2 prompts got no reply .*no reply in time"):
        generate(server, tmp_path, 5, request_timeout=0.2, **more)
    server.always = "500"
    with pytest.raises(LogitcaskError, match="5 prompts got no reply"):
        generate(server, tmp_path, 5, **more)


def command(values: dict[str, Any]) -> list[str]:
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "pipeline.cli", "generate-data", *words]


@pytest.mark.parametrize("provider", PROVIDERS)
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
        time.sleep(0.2)  # what was under way at the server ends
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
    server.delay = 0.05
    with subprocess.Popen(command(options(server, tmp_path, 80)), stderr=subprocess.PIPE, text=True) as process:
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


def test_a_full_disk_is_told_in_a_line_and_gone_on_from(server: ModelServer, tmp_path: Path) -> None:
    values = options(server, tmp_path, 80)

    def no_more_than_a_few_answers() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    full = subprocess.run(
        command(values), capture_output=True, text=True, check=False, preexec_fn=no_more_than_a_few_answers
    )
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1
    assert "File too large" in full.stderr
    before = Counter(server.asked)
    generate(server, tmp_path, 80)
    assert len((tmp_path / "out" / "answers.jsonl").read_bytes()[:4000].splitlines()) > 5
    assert len(server.asked) - 80 <= 8 < sum(before.values())
    assert len(records(tmp_path)) == 80


def test_more_examples_leave_the_earlier_where_they_are(server: ModelServer, tmp_path: Path) -> None:
    generate(server, tmp_path, 40, validation_fraction=0.3)
    before = {name: records(tmp_path, name) for name in ("train", "validation")}
    assert 3 < len(before["validation"]) < 25
    generate(server, tmp_path, 80, validation_fraction=0.3)
    assert Counter(server.asked) == dict.fromkeys(server.asked, 1)
    for name, found in before.items():
        assert records(tmp_path, name)[: len(found)] == found
    assert len(records(tmp_path)) + len(records(tmp_path, "validation")) == 80


def test_other_settings_want_another_folder(server: ModelServer, tmp_path: Path) -> None:
    generate(server, tmp_path, 3, temperature=0.5)
    with pytest.raises(LogitcaskError) as told:
        generate(server, tmp_path, 3, model="n", max_new_tokens=5)
    assert "max_new_tokens: folder has 1024, this run has 5; model: folder has 'm', this run has 'n'" in str(told.value)
    assert "temperature: folder has 0.5, this run has None" in str(told.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text("mine\n")
    with pytest.raises(LogitcaskError, match="exists already"):
        generate(server, tmp_path, 3, output_dir=tmp_path / "other")
    assert (tmp_path / "other" / "train.jsonl").read_text() == "mine\n"
    (tmp_path / "out" / "manifest.json").write_text("[]")
    with pytest.raises(LogitcaskError, match="is no manifest"):
        generate(server, tmp_path, 3)


def test_text_that_is_no_unicode_is_kept_as_far_as_it_is(server: ModelServer, tmp_path: Path) -> None:
    server.replies = dict.fromkeys([f"go word{n}" for n in range(40)], "half \ud83d a pair\x00\u2028 naïve")
    generate(server, tmp_path, 80)
    assert "half ? a pair\x00\u2028 naïve" in [record["response"] for record in records(tmp_path)]
    assert generate(server, tmp_path, 80)
    assert len(server.asked) == 80


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_no_key_no_request(provider: str, server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"{provider.upper()}_API_KEY"
    monkeypatch.delenv(variable)
    with pytest.raises(LogitcaskError, match=f"needs a key: set the environment variable {variable}"):
        generate(server, tmp_path, 3, provider)
    assert not server.asked


@pytest.mark.parametrize("provider", PROVIDERS)
def test_missing_packages_are_named(
    provider: str, server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = provider.removesuffix("-compatible")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LogitcaskError, match=rf"{package}: pip install 'logitcask\[providers\]'"):
        generate(server, tmp_path, 3, provider)
