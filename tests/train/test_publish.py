"""The model card of a student, and sending ``final/`` to the hub: once, again, after a broken connection, refused."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.order import held_out
from logitcask.pipeline.cli import main
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train import publish
from tests.support.hub import READER, Hub, reach, serving_hub
from tests.support.runs import metrics, train, train_settings

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub() as hub:
        reach(hub, monkeypatch)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the first endpoint that it saw
        yield hub


def test_a_student_is_sent_with_its_card(
    cache: Path, options: dict[str, Any], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {**options, "max_steps": 2, "push_to_hub": "me/student", "training_args": {"hub_private_repo": True}}
    hub.broken = ["before"]
    with pytest.raises(LogitcaskError, match=r"final is saved: push it with hf upload me/student .*final"):
        train(cache, tmp_path / "run", **named)
    assert hub.titles("me/student", "models") == []
    for _ in range(2):  # the second time there is nothing to send
        train(cache, tmp_path / "run", **named, resume_from_checkpoint="latest")
        assert len(hub.titles("me/student", "models")) == 1
        assert hub.uploads == 1
    sent = hub.repositories["models", "me/student"]
    final = tmp_path / "run" / "final"
    there = {name: data for name, (data, _) in sent.files("main").items() if name != ".gitattributes"}
    assert sent.private
    assert there == {file.name: file.read_bytes() for file in final.iterdir()}
    card = ModelCard.load(final / publish.CARD)
    card.validate(repo_type="model")
    assert card.data.library_name == "transformers"
    reader = CacheReader(cache)
    assert reader.manifest.data.fingerprint in card.text
    gold = [reader.example(int(i)).targets.gold_logprobs for i in held_out(len(reader), 0.1, 0)]
    perplexity = re.findall(r"\| perplexity \| [\d.,]+ \| [\d.,]+ \| ([\d.,]+) \|", card.text)[0]
    (loss,) = {round(-sum(g.sum() for g in gold) / sum(map(len, gold)), 2)}
    assert float(perplexity.replace(",", "")) == pytest.approx(2.718281828**loss, rel=0.01)
    again: list[TrainSettings] = []
    monkeypatch.setattr("logitcask.pipeline.train.train.run_training", again.append)
    (line,) = re.findall(r"```sh\n(.*)\n```", card.text)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit):
        main()
    learned = [
        {name: value for name, value in settings.model_dump().items() if name not in publish.NOT_LEARNED}
        for settings in (again[0], train_settings(cache, tmp_path / "run", **named))
    ]
    ours = {"learning_rate": 5e-4, "use_mixed_precision": False}  # defaults, as resolved
    assert learned[0] == {**learned[1], **ours}


def test_a_student_is_continued_from_a_revision(
    cache: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that its tag names, not the newest, whose weights are others."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "downloads"))
    run = train(cache, tmp_path / "run", push_to_hub="me/student")
    sent = hub.repositories["models", "me/student"]
    sent.refs["v1"] = sent.refs["main"]
    other = train(cache, tmp_path / "other", learning_rate=1e-2)
    sent.commit("newer", {**sent.files("main"), WEIGHTS: ((other / "final" / WEIGHTS).read_bytes(), True)})
    for revision, begun in (("v1", run), ("main", other)):
        further = train(cache, tmp_path / revision, student_model="me/student", student_revision=revision, max_steps=1)
        before, after = metrics(further)["before"], metrics(begun)["after"]
        assert before["eval_total_loss"] == pytest.approx(after["eval_total_loss"], rel=1e-6)
    assert metrics(run)["after"]["eval_total_loss"] != pytest.approx(metrics(other)["after"]["eval_total_loss"])


def test_every_kind_of_option_is_in_the_command(tmp_path: Path) -> None:
    given = {
        "where": {"language": ["python", "go"]},
        "columns": {"response": "my answer"},
        "training_args": {"optim": "sgd"},
        "student_config": None,
        "temperature": "1:2",
        "student_model": "me/it's",
        "use_gradient_checkpointing": True,
    }
    line = publish.command(train_settings(["a:0.5", "b:0.5"], tmp_path / "run", **given))
    assert "--cache a:0.5 --cache b:0.5" in line
    words = shlex.split(line)
    for flag, value in {
        "--where": "language=python,language=go",
        "--columns": "response=my answer",
        "--temperature": "1.0:2.0",
    }.items():
        assert words[words.index(flag) + 1] == value
    assert {"--use-gradient-checkpointing", "me/it's", '{"optim": "sgd"}'} <= set(words)


@pytest.mark.parametrize(
    ("repository", "token", "line"),
    [
        ("me/student", "", "needs a token"),
        ("me/student", READER, "the token may not write to me/student"),
        ("a/b/c", "hf_writer", "--push-to-hub: must be NAME or ME/NAME, got 'a/b/c'"),
    ],
)
def test_what_the_hub_refuses_is_said_before_training(
    repository: str, token: str, line: str, cache: Path, options: dict[str, Any], hub: Hub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reach(hub, monkeypatch, token)
    with pytest.raises(LogitcaskError, match=line) as caught:
        train(cache, tmp_path / "run", **options, push_to_hub=repository)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
