"""Labels of other tools become a cache label for label, if they fit their text; what they lack is recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.labels import SparseTargets
from logitcask.cache.layout import HEAD_SCALE, ODDS_SCALE
from logitcask.cache.manifest import Manifest
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.pipeline.labels_from.import_labels import ImportReport, import_labels
from logitcask.pipeline.precompute.sharding import shuffled
from logitcask.pipeline.settings.cache import ImportSettings
from tests.support.foreign import Drawn, drawn_texts, top_k_row
from tests.support.tiny import folder_bytes, make_tokenizer, write_jsonl

K = 6
TEXTS = drawn_texts()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("tokenizer")
    made = make_tokenizer()
    assert len(made) == 300
    made.save_pretrained(place)
    return str(place)


@pytest.fixture
def bring(tmp_path: Path, tokenizer: str) -> Any:
    """Return a function that imports rows, or a source, to ``tmp_path/cache``."""

    def call(rows: list[dict[str, Any]] | Path, **changes: Any) -> ImportReport:
        source = write_jsonl(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        given = {"source": str(source), "format": "topk", "tokenizer": tokenizer, "output": tmp_path / "cache"}
        return import_labels(ImportSettings.model_validate({**given, **changes}))

    return call


def labels_of(cache: Path) -> list[tuple[NDArray[Any], NDArray[np.bool_], SparseTargets]]:
    """Return ids, mask and labels of each example in the order of its source, of a sound cache."""
    assert verify(cache).problems == []
    reader = CacheReader(cache)
    order = shuffled(len(reader), 0)
    places = [reader.example(int(np.flatnonzero(order == i)[0])) for i in range(len(reader))]
    return [(e.input_ids, e.target_mask, e.targets) for e in places]


def require_labels(cache: Path, texts: list[Drawn], k: int, *, rest: bool = True) -> None:
    """Fail unless a cache holds the K most probable tokens after each token but the last, to half a code."""
    for (ids, mask, targets), text in zip(labels_of(cache), texts, strict=True):
        want_ids, want = text.top(k)
        np.testing.assert_array_equal(ids, text.ids)
        np.testing.assert_array_equal(mask, np.arange(len(ids)) < len(ids) - 1)
        np.testing.assert_array_equal(targets.head_ids, want_ids[:-1])
        total = 0.0 if rest else np.log(np.exp(want[:-1].astype(np.float64)).sum(1, keepdims=True))
        np.testing.assert_allclose(targets.head_logprobs, want[:-1] - total, atol=HEAD_SCALE / 2 + 1e-5)
        left = 1 - np.exp(want[:-1].astype(np.float64)).sum(1)
        if rest:
            odds = np.log(left) - np.log1p(-left)
            got = targets.log_tail_mass[:, 0] - np.log(-np.expm1(targets.log_tail_mass[:, 0].astype(np.float64)))
            np.testing.assert_allclose(got, odds, atol=ODDS_SCALE / 2 + 1e-3)
        else:
            assert np.isneginf(targets.log_tail_mass).all()


def manifest_of(cache: Path) -> Manifest:
    return CacheReader(cache).manifest


@pytest.mark.parametrize("layout", ["all", "but the last", "shifted", "unsorted", "extra entries"])
def test_log_probabilities_keep_the_rest(layout: str, bring: Any, tmp_path: Path) -> None:
    rows = []
    for text in TEXTS:
        ids, values = text.top(K)
        if layout == "extra entries":  # of different number: as many as every position has are kept
            more, wider = text.top(K + 2)
            rows.append(top_k_row(text, K))
            rows[-1]["token_ids"][1], rows[-1]["logprobs"][1] = more[1].tolist(), wider[1].tolist()
        elif layout == "shifted":  # a row stands at the token it is the distribution of, and the first has none
            rows.append(
                {
                    "input_ids": text.ids.tolist(),
                    "token_ids": [None, *ids[:-1].tolist()],
                    "logprobs": [None, *values[:-1].tolist()],
                }
            )
        else:
            backwards = slice(None, None, -1 if layout == "unsorted" else 1)
            stop = len(ids) - (layout == "but the last")
            rows.append(
                {
                    "input_ids": text.ids.tolist(),
                    "token_ids": ids[:stop, backwards].tolist(),
                    "logprobs": values[:stop, backwards].tolist(),
                }
            )
    report = bring(rows)
    require_labels(tmp_path / "cache", TEXTS, K)
    label = manifest_of(tmp_path / "cache").label
    assert (label.head_size, label.tail_draws, label.temperatures) == (K, 0, [1.0])
    assert label.unknown == ["gold"]
    assert report.most == (K + 2 if layout == "extra entries" else K)


@pytest.mark.parametrize("kind", ["logits", "renormalized"])
def test_the_rest_of_bare_top_k_is_unknown(kind: str, bring: Any, tmp_path: Path) -> None:
    rows = []
    for text in TEXTS:
        row = top_k_row(text, K)
        values = np.array(row.pop("logprobs"))
        values += 7.5 if kind == "logits" else -np.log(np.exp(values).sum(1, keepdims=True))
        rows.append({**row, "mine": values.tolist()})
    bring(rows, columns="logprobs=mine")
    require_labels(tmp_path / "cache", TEXTS, K, rest=False)
    assert manifest_of(tmp_path / "cache").label.unknown == ["rest", "gold"]


def test_only_what_labels_say_is_a_target(bring: Any, tmp_path: Path) -> None:
    rows = [top_k_row(text, K, labels=[-100] * 5 + text.ids[5:].tolist()) for text in TEXTS]
    bring(rows)
    for _, mask, targets in labels_of(tmp_path / "cache"):
        np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(4, len(mask) - 1))
        assert len(targets) == mask.sum()


def test_positions_with_fewer_entries_than_head_size_are_left_out(bring: Any, tmp_path: Path) -> None:
    rows = [top_k_row(text, K) for text in TEXTS]
    rows[3]["logprobs"][2][-1] = None
    report = bring(rows, head_size=K)
    assert report.positions_left_out == 1
    assert manifest_of(tmp_path / "cache").label.head_size == K
    assert not labels_of(tmp_path / "cache")[3][1][2]
    bring(rows, overwrite=True)
    assert manifest_of(tmp_path / "cache").label.head_size == K - 1


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda row: row.pop("token_ids"), "no token_ids: the columns are input_ids, logprobs; name yours with --colu"),
        (lambda row: row["logprobs"].pop(), "token_ids has 23 rows, logprobs 22"),
        (lambda row: row["logprobs"][4].pop(), "different numbers of entries at position 4"),
        (lambda row: row["token_ids"][4].__setitem__(0, 300), "id 300 at position 4 is outside --tokenizer's vocab"),
        (lambda row: row["token_ids"][4].__setitem__(0, row["token_ids"][4][1]), "an id stands twice at position 4"),
        (lambda row: row["token_ids"][4].__setitem__(0, 1.5), "token_ids: must be token ids"),
        (lambda row: row["logprobs"][4].__setitem__(0, "x"), "logprobs: must be numbers"),
        (lambda row: row["logprobs"][4].__setitem__(0, float("nan")), "logprobs: must be numbers, got nan"),
        (lambda row: row["logprobs"].__setitem__(4, [0.0] * K), "the probabilities at position 4 sum to 6, unlike"),
        (lambda row: row["input_ids"].__setitem__(0, -3), "input_ids must be from 0 to 299"),
        (lambda row: row["input_ids"].extend([1, 1]), "must have 26 rows, as there are tokens, or one less; got 23"),
        (lambda row: row.__setitem__("labels", [1]), "labels or target_mask: must be one per token, 24, got 1"),
    ],
)
def test_a_malformed_row_is_one_line_with_its_place(spoil: Any, rule: str, bring: Any, tmp_path: Path) -> None:
    rows = [top_k_row(text, K) for text in TEXTS]
    spoil(rows[3])
    with pytest.raises(LogitcaskError) as caught:
        bring(rows)
    assert rule in str(caught.value)
    assert "rows.jsonl:4" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    bring(rows, on_bad_record="skip", max_bad="10%")
    assert len(CacheReader(tmp_path / "cache")) == len(TEXTS) - 1


def test_labels_that_do_not_fit_their_text_are_refused(bring: Any) -> None:
    good = [top_k_row(text, K) for text in TEXTS]
    other = np.random.default_rng(1).permutation(300)
    renumbered = [{**row, "token_ids": other[np.array(row["token_ids"])].tolist()} for row in good]
    with pytest.raises(LogitcaskError, match="the labels do not fit the text: its tokens are among the entries at"):
        bring(renumbered)
    early = [{**row, "input_ids": [0, *row["input_ids"][:-1]]} for row in good]  # one token behind their rows
    with pytest.raises(LogitcaskError, match="they fit the text best 1 token later: shift them"):
        bring(early)
    low = [{**row, "logprobs": (np.array(row["logprobs"]) - 5).tolist()} for row in good]
    with pytest.raises(LogitcaskError, match="neither log-probabilities nor logits"):
        bring(low)
    with pytest.raises(LogitcaskError, match="holds probabilities, not their logarithms"):
        bring([{**row, "logprobs": np.exp(row["logprobs"]).tolist()} for row in good])
    with pytest.raises(LogitcaskError, match="has no labels: every row is empty"):
        bring([{**row, "logprobs": [[None] * K] * len(row["logprobs"])} for row in good])


def test_an_interrupted_import_is_finished_by_the_same_command(
    bring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcask.pipeline.labels_from.import_labels.SHARD_POSITIONS", 60)
    rows = [top_k_row(text, K) for text in TEXTS]
    whole = bring(rows)
    assert whole.shards_written > 3
    wanted = folder_bytes(tmp_path / "cache")
    for lost in ("commits/c/1/0", "commits/c/3/0", "head_ids/c/3/0"):
        (tmp_path / "cache" / lost).unlink()
    assert bring(rows).shards_written == 2
    assert folder_bytes(tmp_path / "cache") == wanted
    assert bring(rows).shards_written == 0
    rows[0]["logprobs"][0][0] -= 0.2
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights"):
        bring(rows)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
