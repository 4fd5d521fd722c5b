"""A teacher behind real HTTP servers: its labels, and what becomes of a run whose servers fail."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.served import servers
from logitcask.pipeline.teachers.served.servers import Connection
from logitcask.pipeline.teachers.served.teacher import ServedTeacher, load_served_teacher
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.support.score_server import Reply, ScoreServer, serving, wait_until
from tests.support.tiny import RECORDS, folder_bytes, make_teacher, write_jsonl

LABEL = LabelSettings(vocab_size=300, head_size=20, tail_draws=0, temperatures=[1.0], seed=0, fidelity_positions=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    make_teacher(place / "teacher", max_length=128)
    write_jsonl(place / "train.jsonl", RECORDS)
    return place


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.02)


@pytest.fixture
def server(folder: Path) -> Iterator[ScoreServer]:
    with serving(ScoreServer(folder / "teacher")) as state:
        yield state


def connect(folder: Path, *states: ScoreServer, head_size: int = 20, max_retries: int = 3) -> ServedTeacher:
    connection = Connection(tuple(f"{state.url}/v1" for state in states), 4, 10.0, max_retries)
    source = str(folder / "teacher")
    return load_served_teacher("tiny", connection, source, revision=None, trust_remote_code=False, head_size=head_size)


def run(folder: Path, output: Path, *states: ScoreServer, **changes: object) -> CacheReader:
    values: dict[str, Any] = {
        "engine": "server",
        "base_url": ",".join(state.url for state in states),
        "teacher_model": "tiny",
        "tokenizer": str(folder / "teacher"),
        "train_data": str(folder / "train.jsonl"),
        "output": str(output),
        "max_seq_length": 64,
        "shard_positions": 64,
        "concurrency": 4,
        "max_retries": 30,
    }
    precompute(resolve(PrecomputeSettings, None, {**values, **changes}))
    return CacheReader(output)


def examples() -> list[TokenizedExample]:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 300, length) for length in (60, 33, 12, 2)]
    texts[0][-5:] = 299  # the last of the vocabulary, which SGLang calls 0
    masks = [(np.arange(len(text)) < len(text) - 1) & (random.random(len(text)) < 0.7) for text in texts]
    masks[-1][0] = True
    return [TokenizedExample(n, texts[n], masks[n], np.zeros(masks[n].sum(), dtype=bool)) for n in range(len(texts))]


@pytest.mark.parametrize(("kind", "has_tokenize"), [("vllm", True), ("sglang", True), ("sglang", False)])
def test_labels_are_the_heads_of_the_transformers_engine(folder: Path, kind: str, has_tokenize: bool) -> None:
    """Label by label; texts are sent as ids, and several at a time."""
    plain = load_teacher(str(folder / "teacher"), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    with serving(ScoreServer(folder / "teacher", kind, has_tokenize=has_tokenize)) as state:
        teacher = connect(folder, state)
        found = teacher.label(examples(), LABEL).targets
    wanted = plain.label(examples(), LABEL).targets
    for own, others in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(own.head_ids, others.head_ids)
        np.testing.assert_allclose(own.head_logprobs, others.head_logprobs, atol=1e-5)
        np.testing.assert_allclose(own.gold_logprobs, others.gold_logprobs, atol=1e-5)
        np.testing.assert_allclose(np.exp(own.log_tail_mass), np.exp(others.log_tail_mass), atol=1e-5)
        assert own.tail_ids.shape[1] == 0
        assert not own.log_partition.any()
    sent = [body.get("prompt", body.get("input_ids")) for body in state.bodies]
    assert [e.input_ids.tolist() in sent for e in examples()] == [True] * 4
    if kind == "sglang":
        starts = {tuple(body["input_ids"]): body["logprob_start_len"] for body in state.bodies if "input_ids" in body}
        assert [starts[tuple(e.input_ids)] for e in examples()] == [int(e.target_mask.argmax()) for e in examples()]
    assert (teacher.facts.max_length, teacher.facts.made_by.engine) == (127, "server")
    assert teacher.facts.made_by.versions[kind] == {"vllm": "1.2", "sglang": "3.4"}[kind]


def test_the_head_may_be_the_whole_vocabulary(folder: Path) -> None:
    with serving(ScoreServer(folder / "teacher", most_logprobs=300)) as state:
        (targets,) = connect(folder, state, head_size=300).label(examples()[:1], LABEL).targets
    assert np.isneginf(targets.log_tail_mass).all()


def test_whatever_the_servers_do_the_cache_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Two servers; rate limits, broken connections, errors, and one that dies and comes back."""
    with serving(ScoreServer(folder / "teacher")) as alone:
        calm = run(folder, tmp_path / "calm", alone)
    assert calm.manifest.teacher.engine == "server"
    assert calm.manifest.label.usual_tail == "bucket"
    assert verify(tmp_path / "calm").problems == []
    faults = ["", "429", "cut", "503", "500"]
    first, second = (ScoreServer(folder / "teacher", faults=faults * 2) for _ in range(2))
    with ThreadPoolExecutor(1) as pool, serving(first):
        with serving(second):
            rough = pool.submit(run, folder, tmp_path / "rough", first, second)
            wait_until(lambda: len(second.bodies) >= 8)
        before = len(second.bodies)
        with serving(second):
            rough.result(60)
    assert first.faults == second.faults == []
    assert len(second.bodies) > before
    assert 1 < first.most_running <= 4
    assert folder_bytes(tmp_path / "rough") == folder_bytes(tmp_path / "calm")


def test_a_run_that_stopped_is_finished_by_shard(server: ScoreServer, folder: Path, tmp_path: Path) -> None:
    """A refusal stops it in one line; the same command asks only for the shards that are missing."""
    whole = run(folder, tmp_path / "whole", server)
    sent = len(server.bodies)
    server.faults = [""] * (sent - 4) + ["400"]
    with pytest.raises(LogitcaskError, match=r"HTTP 400: 'no, None': correct that and run the same command again"):
        run(folder, tmp_path / "cache", server, concurrency=1)
    server.faults.clear()
    make_teacher(tmp_path / "other", seed=1)
    other = pytest.raises(LogitcaskError, match=r"its labels differ from the server's by .* nats on average")
    with serving(ScoreServer(tmp_path / "other")) as changed, other:
        run(folder, tmp_path / "cache", changed)
    before = len(server.bodies)
    assert folder_bytes(Path(run(folder, tmp_path / "cache", server).path)) == folder_bytes(tmp_path / "whole")
    assert 4 <= len(server.bodies) - before < sent / 2 < len(whole)
    asked = len(server.bodies)
    run(folder, tmp_path / "cache", server)
    assert len(server.bodies) == asked


def _vllm(change: Callable[[list[Any]], Any]) -> Callable[[Reply], Reply]:
    """Return a function that changes the rows of a reply of vLLM; what it returns, if anything, takes their place."""

    def spoil(reply: Reply) -> Reply:
        rows = reply["choices"][0]["prompt_logprobs"]
        reply["choices"][0]["prompt_logprobs"] = change(rows) or rows
        return reply

    return spoil


def _values(value: Callable[[float], float | None]) -> Callable[[Reply], Reply]:
    return _vllm(
        lambda rows: [row and {t: {**e, "logprob": value(e["logprob"])} for t, e in row.items()} for row in rows]
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "cap": ({"most_logprobs": 10}, r"max allowed: 10'?.*: start vLLM with --max-logprobs 20 or more, or lower"),
    "fewer": (
        {"spoil": _vllm(lambda rows: [row and dict(list(row.items())[:5]) for row in rows])},
        r"has . of 20 entries at position 0: start vLLM with --max-logprobs 20",
    ),
    "nan": ({"spoil": _values(lambda value: None)}, "no label at position 0: a log-probability is not a number"),
    "logits": ({"spoil": _values(lambda value: value + 9)}, "sum to more than 1: .*--logprobs-mode raw_logprobs"),
    "rows": ({"spoil": _vllm(lambda rows: rows[:-1])}, r"has 47 rows of prompt_logprobs for 48 tokens"),
    "text": ({"spoil": _vllm(lambda rows: [rows[0], *rows[:0:-1]])}, "lacks the text's own token at position 0"),
    "none": ({"spoil": _vllm(lambda rows: [None] * len(rows))}, "is of another form than expected"),
    "openai": ({"spoil": lambda reply: {"choices": [{"text": "x"}]}}, "has no prompt_logprobs"),
    "html": ({"spoil": lambda reply: {"object": "error"}}, "is of another form than expected: KeyError"),
    "name": ({"name": "big"}, r"serves 'big', not tiny: give that as --teacher-model"),
    "broken": ({"faults": ["500"] * 9}, "failed a request 4 times: .*HTTP 500"),
    "key": ({"faults": ["401"]}, r"HTTP 401: 'no, Bearer \[key\]': set the environment variable OPENAI_COMPATIBLE_API"),
    "gateway": ({"has_tokenize": False}, "/tokenize: does not answer .*give the server's own URL"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG.values(), ids=WRONG)
def test_a_server_that_does_not_fit_is_one_line(
    changes: dict[str, Any], reason: str, server: ScoreServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_COMPATIBLE_API_KEY", "sk-a-secret")
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(LogitcaskError, match=reason) as refused:
        connect(folder, server)
    message = str(refused.value)
    assert message.startswith(server.url)
    assert "\n" not in message
    assert "sk-a-secret" not in message
    assert server.keys <= {"Bearer sk-a-secret"}


def test_servers_of_other_weights_or_another_tokenizer_are_refused(
    server: ScoreServer, folder: Path, tmp_path: Path
) -> None:
    make_teacher(tmp_path / "other", seed=1)
    same = pytest.raises(LogitcaskError, match="must serve the same weights")
    with serving(ScoreServer(tmp_path / "other")) as other, same:
        run(folder, tmp_path / "cache", server, other)
    make_teacher(tmp_path / "split", vocab_size=280)
    with serving(ScoreServer(tmp_path / "split")) as other, pytest.raises(LogitcaskError, match="its tokenizer splits"):
        connect(folder, other)
    longer = pytest.raises(LogitcaskError, match="--max-seq-length 64 is more than the teacher's 39: lower it")
    with serving(replace(server, port=0, max_model_len=40)) as short, longer:
        run(folder, tmp_path / "cache", short)
    down = replace(server, port=9)
    with pytest.raises(
        LogitcaskError, match=r"no connection \(.*\), after 0 retries: start it and run the same command"
    ):
        connect(folder, down, max_retries=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": None}, "--engine server requires --base-url"),
        ({"engine": "vllm"}, "--base-url requires --engine server: add it"),
        ({"dtype": "float32"}, "--dtype does not apply to --engine server: leave it out"),
        ({"ray": "auto"}, "--ray does not apply to --engine server: leave it out"),
        ({"base_url": "http://me:secret@host"}, "--base-url must be http:// or https://, a host and a path"),
        ({"tail_draws": 8}, "--engine server gives the head at T=1 alone: add --tail-draws 0"),
        ({"temperatures": "1,2"}, "--engine server gives the head at T=1 alone: add --tail-draws 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {
        "engine": "server",
        "base_url": "http://h",
        "teacher_model": "m",
        "train_data": "d",
        "output": "o",
        **changes,
    }
    with pytest.raises(LogitcaskError, match=message) as refused:
        resolve(PrecomputeSettings, None, {name: value for name, value in given.items() if value})
    assert "secret" not in str(refused.value)


def test_a_server_gives_20_tokens_unless_a_preset_says_otherwise() -> None:
    given = {
        "engine": "server",
        "base_url": "http://a:1/v1, http://b",
        "teacher_model": "m",
        "train_data": "d",
        "output": "o",
    }
    usual = resolve(PrecomputeSettings, None, given)
    assert usual.base_url == ("http://a:1/v1", "http://b")
    assert (usual.head_size, usual.tail_draws, usual.temperatures, usual.fidelity_positions) == (20, 0, (1.0,), 0)
    assert resolve(PrecomputeSettings, None, {**given, "preset": "rich"}).head_size == 32
