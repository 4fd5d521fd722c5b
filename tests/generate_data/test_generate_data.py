"""Data from models behind an API: what is sent, what is retried, what it costs, what is written."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.generate_data import client as asking
from logitcask.pipeline.generate_data import providers as apis
from logitcask.pipeline.generate_data.generate import generate_data
from logitcask.pipeline.generate_data.prompts import make_prompts, read_templates
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import read_records
from tests.support.model_server import (
    KEY,
    OUTPUT_TOKENS,
    PROVIDERS,
    ModelServer,
    generate,
    manifest,
    model_server_with_keys,
    options,
    records,
)
from tests.support.tiny import folder_bytes, make_tokenizer


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server_with_keys() as running:
        yield running


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_prompt_is_asked_once_and_becomes_an_example(provider: str, server: ModelServer, tmp_path: Path) -> None:
    more = {} if provider == "anthropic" else {"temperature": 0.5}
    printed = generate(server, tmp_path, 20, provider, max_new_tokens=77, **more)
    assert max(Counter(server.asked).values()) == 1
    written = records(tmp_path)
    assert sorted(record["prompt"] for record in written) == sorted(server.asked)
    assert [record["prompt"] for record in written] == [p.text for p in make_prompts(
        read_templates(tmp_path / "prompts.yaml"), 20, 0)]  # fmt: skip
    for _, record in read_records([str(tmp_path / "out" / "train.jsonl")]):
        assert isinstance(record, dict)
        assert record["response"] == server.reply(record["prompt"])
        assert len(Encoder(make_tokenizer(), prompt_loss=False).examples(record)) == 1
    limit = "max_completion_tokens" if provider == "openai" else "max_tokens"
    turn = [{"role": "user", "content": server.asked[0]}]
    assert server.bodies[0] == {"model": "m", "messages": turn, limit: 77, **more}
    assert "20 examples" in printed
    assert "cost unknown: no price for m, give it with --prices m=INPUT/OUTPUT" in printed
    assert manifest(tmp_path)["counts"]["answered"] == 20
    assert manifest(tmp_path)["dollars"] is None


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_key_goes_to_the_server_and_nowhere_else(
    provider: str, server: ModelServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = {"go word1": ["400"], "go word2": ["500"]}
    with pytest.raises(LogitcaskError, match=r"1 prompts got no reply.*Error code: 400.*Bearer \[key\]") as raised:
        generate(server, tmp_path, 80, provider)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    error: BaseException | None = raised.value
    while error is not None:
        assert KEY not in repr(error)
        error = error.__cause__ or error.__context__
    assert KEY not in "".join(capfd.readouterr())
    assert all(KEY.encode() not in data for data in folder_bytes(tmp_path).values())


def test_openais_variables_are_not_sent_to_another_server(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_COMPATIBLE_API_KEY")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    generate(server, tmp_path, 3, "openai-compatible")
    assert all(KEY not in value for headers in server.headers for value in headers.values())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_transient_faults_are_retried(provider: str, server: ModelServer, tmp_path: Path) -> None:
    faults = {f"go word{n}": [fault] for n, fault in enumerate(("500", "529", "cut", "timeout", "429"))}
    server.faults = {prompt: list(of) for prompt, of in faults.items()}
    generate(server, tmp_path, 80, provider, concurrency=40, request_timeout=3)
    assert Counter(server.asked) == {
        f"{lang} word{n}": 1 for lang in ("go", "python") for n in range(40)
    } | dict.fromkeys(faults, 2)
    assert len(records(tmp_path)) == 80
    first, second = (at for at, prompt in zip(server.at, server.asked, strict=True) if prompt == "go word4")
    assert second - first >= 1, "retry-after was not honoured"


def test_retries_are_limited_in_number_and_time(server: ModelServer, tmp_path: Path) -> None:
    server.faults, server.retry_after = {"go word1": ["500"] * 3, "go word2": ["429"]}, "3600"
    with pytest.raises(LogitcaskError, match="2 prompts got no reply"):
        generate(server, tmp_path, 80, max_retries=1)
    assert server.asked.count("go word1") == 2
    assert server.asked.count("go word2") == 1, "it does not wait for an hour"


def test_a_wait_of_an_hour_ends_in_time(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anthropic's package itself would wait for any retry-after."""
    monkeypatch.setattr(apis, "LONGEST_WAIT", 1.0)
    server.faults, server.retry_after = {"go word2": ["429"]}, "3600"
    began = time.monotonic()
    with pytest.raises(LogitcaskError, match=r"1 prompts got no reply .*no reply in time"):
        generate(server, tmp_path, 80, "anthropic", max_retries=1, request_timeout=1)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fault", ["garbage", "html", "shapeless"])
def test_prompts_without_a_reply_are_asked_by_the_next_run(
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
    printed = generate(server, tmp_path, 80, provider, prices="m=1/2")
    assert "dropped: 1 duplicate, 1 empty, 1 length, 1 refusal, 1 syntax" in printed
    assert manifest(tmp_path)["counts"]["dropped"] == dict.fromkeys(
        ("duplicate", "empty", "length", "refusal", "syntax"), 1
    )
    assert len(records(tmp_path)) == 75
    before = folder_bytes(tmp_path / "out")
    assert generate(server, tmp_path, 80, provider, prices="m=1/2") == printed
    assert len(server.asked) == 80
    assert folder_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("status", ["401", "404"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_wrong_key_or_model_stops_the_run(status: str, provider: str, server: ModelServer, tmp_path: Path) -> None:
    server.always = status
    with pytest.raises(LogitcaskError, match=f"Error code: {status}"):
        generate(server, tmp_path, 80, provider, concurrency=3)
    assert len(server.asked) <= 3


def test_a_server_that_is_down_is_given_up(server: ModelServer, tmp_path: Path) -> None:
    server.always = "500"
    with pytest.raises(LogitcaskError, match=f"{asking.MAX_CONSECUTIVE_FAILURES} prompts got no reply"):
        generate(server, tmp_path, 80, concurrency=1, max_retries=0)
    assert len(server.asked) == asking.MAX_CONSECUTIVE_FAILURES
    assert manifest(tmp_path)["stopped"] == "failures"


def test_scattered_failures_do_not_stop_a_run(server: ModelServer, tmp_path: Path) -> None:
    server.faults = {f"go word{n}": ["500"] for n in range(2 * asking.MAX_CONSECUTIVE_FAILURES)}
    with pytest.raises(LogitcaskError, match=f"{2 * asking.MAX_CONSECUTIVE_FAILURES} prompts got no reply"):
        generate(server, tmp_path, 80, concurrency=1, max_retries=0)
    assert len(server.asked) == 80


def test_no_server_at_all(server: ModelServer, tmp_path: Path) -> None:
    values = options(server, tmp_path, 20, "openai-compatible", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(LogitcaskError, match="no connection"):
        generate_data(resolve(GenerateDataSettings, None, values))


def test_requests_at_once_are_limited(server: ModelServer, tmp_path: Path) -> None:
    server.delay = 0.05
    generate(server, tmp_path, 40, concurrency=5)
    assert server.most_running == 5


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_cost_stays_within_its_limit(concurrency: int, server: ModelServer, tmp_path: Path) -> None:
    """Every reply costs (100 · 100 + 50 · 200) / 10^6 = 0.02 dollars, and can cost 0.0365 plus its prompt's bytes."""
    server.delay = 0.01
    price: dict[str, Any] = {
        "prices": "other=9/9,m=100/200",
        "max_new_tokens": OUTPUT_TOKENS,
        "concurrency": concurrency,
    }
    printed = generate(server, tmp_path, 60, max_cost=0.5, **price)
    written = manifest(tmp_path)
    assert written["dollars"] == pytest.approx(0.02 * len(server.asked))
    assert 0.44 < written["dollars"] <= 0.5
    assert written["stopped"] == "max-cost"
    assert f"{60 - len(server.asked)} of 60 prompts are open" in printed
    asked = len(server.asked)
    generate(server, tmp_path, 60, max_cost=0.5, **price)
    assert len(server.asked) == asked, "the limit applies to the folder, not to a run"
    assert "stopped" not in generate(server, tmp_path, 60, max_cost=5, **price)
    assert Counter(server.asked) == dict.fromkeys(server.asked, 1)
    assert len(records(tmp_path)) == 60


def test_expensive_replies_under_way_count(server: ModelServer, tmp_path: Path) -> None:
    """Of twenty concurrent requests, each of which can cost a dollar and reports no tokens, two dollars pay for two."""
    server.always = "no usage"
    printed = generate(server, tmp_path, 40, max_cost=2.2, prices="m=0/1000", max_new_tokens=1000, concurrency=20)
    assert len(server.asked) == 2
    assert manifest(tmp_path)["dollars"] == 2
    assert "2 answers report no tokens and count as the most they can cost" in printed


def test_timeouts_count_as_paid_and_refused_requests_as_free(server: ModelServer, tmp_path: Path) -> None:
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


def test_text_that_is_not_valid_unicode_is_kept_as_far_as_possible(server: ModelServer, tmp_path: Path) -> None:
    server.replies = dict.fromkeys([f"go word{n}" for n in range(40)], "half \ud83d a pair\x00\u2028 naïve")
    generate(server, tmp_path, 80)
    assert "half ? a pair\x00\u2028 naïve" in [record["response"] for record in records(tmp_path)]
    assert generate(server, tmp_path, 80)
    assert len(server.asked) == 80


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_without_a_key_there_is_no_request(
    provider: str, server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
