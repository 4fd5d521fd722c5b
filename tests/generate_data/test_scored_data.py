"""``generate-data --logprobs``: answers and the model's labels of them in one pass, from a server over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.pipeline.generate_data.generate import generate_data
from logitcask.pipeline.labels_from.generated import make_caches
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.support.score_server import ScoreServer, serving
from tests.support.tiny import folder_bytes, make_teacher

PROMPTS, K = 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scored")
    make_teacher(place / "teacher", chat=True)
    topics = [f"topic {n}" for n in range(PROMPTS)]
    (place / "prompts.yaml").write_text(f"languages: [python]\ntopics: {topics}\ncategories: {{x: ['{{topic}}?']}}\n")
    return place


@pytest.fixture
def server(folder: Path) -> Iterator[ScoreServer]:
    with serving(ScoreServer(folder / "teacher")) as state:
        yield state


def run(server: ScoreServer, folder: Path, output: Path, **changes: object) -> str:
    values: dict[str, Any] = {
        "provider": "openai-compatible",
        "base_url": f"{server.url}/v1",
        "model": "tiny",
        "tokenizer": str(folder / "teacher"),
        "prompts": folder / "prompts.yaml",
        "num_examples": PROMPTS,
        "output_dir": output,
        "validation_fraction": 0.25,
        "logprobs": K,
        "temperature": 2,
        "max_retries": 0,
        **changes,
    }
    settings = resolve(GenerateDataSettings, None, {name: value for name, value in values.items() if value is not None})
    return "\n".join([generate_data(settings), *(make_caches(settings) if settings.logprobs else ())])


def test_a_run_gives_a_data_file_and_the_labels_of_the_model(server: ScoreServer, folder: Path, tmp_path: Path) -> None:
    """Each label is what the transformers engine makes of the same tokens, however improbable they were drawn."""
    printed = run(server, folder, tmp_path / "out")
    plain = load_teacher(str(folder / "teacher"), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    label = LabelSettings(vocab_size=300, head_size=K, tail_draws=0, temperatures=[1.0], seed=0)
    examples = outside = 0
    for split in ("train", "validation"):
        assert verify(tmp_path / "out" / f"{split}-cache").problems == []
        reader = CacheReader(tmp_path / "out" / f"{split}-cache")
        assert len(reader) == len((tmp_path / "out" / f"{split}.jsonl").read_text().splitlines())
        assert (reader.manifest.label.head_size, reader.manifest.label.unknown) == (K, None)
        for index in range(len(reader)):
            example = reader.example(index)
            assert example.target_mask.sum() == 10
            assert example.target_mask[-11:-1].all(), "the tokens of the answer, and its end"
            text = TokenizedExample(index, example.input_ids, example.target_mask, np.zeros(10, dtype=bool))
            (wanted,) = plain.label([text], label).targets
            np.testing.assert_array_equal(example.targets.head_ids, wanted.head_ids)
            np.testing.assert_allclose(example.targets.head_logprobs, wanted.head_logprobs, atol=0.13)  # a code's width
            np.testing.assert_allclose(example.targets.gold_logprobs, wanted.gold_logprobs, atol=0.13)
            np.testing.assert_allclose(np.exp(example.targets.log_tail_mass), np.exp(wanted.log_tail_mass), atol=0.05)
            outside += int(
                (example.targets.head_ids[:, :] != example.input_ids[1:][example.target_mask[:-1], None]).all(1).sum()
            )
        examples += len(reader)
    assert examples == PROMPTS
    assert outside > 10
    assert "train-cache" in printed.splitlines()[-2]


def test_an_interrupted_run_asks_for_the_rest_alone_and_gives_the_same_bytes(
    server: ScoreServer, folder: Path, tmp_path: Path
) -> None:
    run(server, folder, tmp_path / "whole")
    asked = len(server.bodies)
    server.faults = [""] * 5 + ["401"]
    with pytest.raises(LogitcaskError, match=r"1 prompts got no reply .*run the same command again for the rest"):
        run(server, folder, tmp_path / "out", concurrency=1)
    assert not (tmp_path / "out" / "train-cache").exists()
    run(server, folder, tmp_path / "out")
    assert len(server.bodies) - asked == PROMPTS + 1
    for name in ("train-cache", "validation-cache"):
        assert folder_bytes(tmp_path / "out" / name) == folder_bytes(tmp_path / "whole" / name)
    before = len(server.bodies)
    run(server, folder, tmp_path / "out")
    assert len(server.bodies) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": 20}, "max allowed: 20.*: start vLLM with a higher --max-logprobs, or lower --logprobs"),
        ({"logprobs": None}, "--tokenizer requires --logprobs"),
        ({"provider": "openai", "base_url": None, "tokenizer": None}, "--provider openai does not take --logprobs"),
        ({"tokenizer": None}, "tiny: no tokenizer could be loaded"),
    ],
)
def test_what_does_not_fit_is_one_line(
    changes: dict[str, Any], message: str, server: ScoreServer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LogitcaskError, match=message) as refused:
        run(server, folder, tmp_path / "out", **changes)
    assert "\n" not in str(refused.value)


def test_servers_and_folders_that_do_not_fit_are_refused(server: ScoreServer, folder: Path, tmp_path: Path) -> None:
    server.spoil = lambda reply: {**reply, "prompt_token_ids": None}
    with pytest.raises(LogitcaskError, match="no token ids with log-probabilities in it: --logprobs needs a server of"):
        run(server, folder, tmp_path / "out")
    server.spoil = lambda reply: reply
    for chat, size in ((True, 270), (False, 300)):
        other = make_teacher(tmp_path / str(size), chat=chat, vocab_size=size)
        with pytest.raises(
            LogitcaskError, match=r"its tokenizer (has 270 tokens, the|gives other texts of the) answers"
        ):
            run(server, folder, tmp_path / "out", tokenizer=str(other))
    with pytest.raises(LogitcaskError, match="logprobs: folder has 8, this run has None"):
        run(server, folder, tmp_path / "out", logprobs=None, tokenizer=None)
