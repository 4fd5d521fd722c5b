"""Copying to the Hugging Face hub: few commits, a card, resumed and checked; what the hub refuses is one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

import logitcask as lc
from logitcask.cache import copy
from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.storage import remote
from logitcask.cache.verify import verify
from tests.support.hub import READER, Hub, reach, serving_hub
from tests.support.tiny import folder_bytes, make_cache

URL = "hf://datasets/me/caches"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("hub"), shard_positions=48)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(copy, "COMMIT_SHARDS", 2)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    with serving_hub() as hub:
        reach(hub, monkeypatch)
        hub.make("me/caches")
        yield hub


def test_a_copy_takes_few_commits_and_comes_back(cache: Path, hub: Hub, tmp_path: Path) -> None:
    shards = len(lc.open(cache).reader.shard_starts) - 1
    assert shards > 4
    done = copy_cache(str(cache), URL, None)
    assert (done.brought, done.found) == (shards, 0)
    assert len(hub.titles("me/caches")) == 1 + -(-shards // 2)
    assert verify(URL).problems == []
    card = DatasetCard.load("me/caches")
    card.validate()
    assert card.data.to_dict()["size_categories"] == ["n<1K"]
    assert f"--cache {URL}" in card.text
    again = copy_cache(str(cache), URL, None)
    assert (again.brought, again.found, again.bytes) == (0, shards, 0)
    first = hub.repositories["datasets", "me/caches"]
    first.refs["v1"] = first.refs["main"]
    copy_cache(URL + "@v1", str(tmp_path / "back"), None)
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache)
    assert len(lc.open(URL, revision="v1")) == len(lc.open(cache))


def test_a_copy_that_breaks_is_resumed(cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit whose reply is lost, or that never arrived, is sent again, by the next run at the latest."""
    hub.broken += ["", "after", "before"]
    copy_cache(str(cache), f"{URL}/code", None)
    assert verify(f"{URL}/code").problems == []
    assert len(set(hub.titles("me/caches"))) == 4
    uploads = hub.uploads
    hub.make("me/caches")
    hub.objects.clear()
    hub.broken += ["", "", *["before"] * remote.TRIES]
    with pytest.raises(LogitcaskError, match=r"no connection after 5 tries: .* run the same command again"):
        copy_cache(str(cache), f"{URL}/code", None)
    assert len(hub.titles("me/caches")) == 2
    done = copy_cache(str(cache), f"{URL}/code", None)
    assert done.found == 2
    assert hub.uploads == 2 * uploads  # what was uploaded but not committed is not sent again
    assert verify(f"{URL}/code").problems == []


def test_what_was_damaged_is_sent_again_and_another_cache_refused(cache: Path, hub: Hub, tmp_path: Path) -> None:
    copy_cache(str(cache), URL, None)
    stored = hub.repositories["datasets", "me/caches"]
    files = dict(stored.files("main"))
    files["head_ids/c/3/0"] = (b"\0spoiled", True)
    files["README.md"] = (b"---\nlicense: mit\n---\nMine.", False)
    stored.commit("spoil", files)
    assert copy_cache(str(cache), URL, None).brought == 1
    assert verify(URL).problems == []
    assert stored.files("main")["README.md"] == files["README.md"]
    other = make_cache(tmp_path, seed=7)
    with pytest.raises(CacheMismatchError, match="holds another cache"):
        copy_cache(str(other), URL, None)


@pytest.mark.parametrize(
    ("url", "token", "line"),
    [
        (URL, "", "the hub needs a token: run hf auth login, or set HF_TOKEN"),
        (URL, "hf_none", "the hub refuses the token"),
        (URL, READER, "the token may not write to me/caches"),
        (
            "hf://datasets/me/none",
            "hf_writer",
            "no such repository, or not for this token: make it with hf repos create",
        ),
        ("hf://me/caches", "hf_writer", "me/caches is no model but a dataset: write hf://datasets/me/caches"),
        (f"{URL}@new", "hf_writer", "me/caches has no branch new: make it"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    url: str, token: str, line: str, cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(hub, monkeypatch, token)
    with pytest.raises(LogitcaskError, match=line) as caught:
        copy_cache(str(cache), url, None)
    assert "\n" not in str(caught.value)
    assert hub.titles("me/caches") == []
