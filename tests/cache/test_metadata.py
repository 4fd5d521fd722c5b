"""Category and language in a cache: kept only if the data has them, copied, verified, and used to choose examples."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from logitcask.cache.copy import copy_cache
from logitcask.cache.errors import CacheFormatError, CacheMismatchError
from logitcask.cache.manifest import metadata_values
from logitcask.cache.reader import CacheReader, matching
from logitcask.cache.report.info import describe, render
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.cache.verify import verify
from logitcask.pipeline.evaluate.evaluate import evaluate
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.runs.evaluation import rows
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.train.sources.cache import cache_source
from tests.support.runs import train
from tests.support.tiny import RECORDS, folder_bytes, make_cache, precompute_settings, write_jsonl

LANGUAGES = ("python", "go", None)
DATA: list[dict[str, object]] = [
    {**record, "language": LANGUAGES[n % 3], **({"category": "sums"} if n < 5 else {})}
    for n, record in enumerate(RECORDS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metadata")
    make_cache(folder, train_data=str(write_jsonl(folder / "data.jsonl", DATA)))
    return folder


def texts(reader: CacheReader) -> dict[bytes, dict[str, str | None]]:
    """Return the metadata of the examples, as text, by their tokens."""
    values = metadata_values(reader.manifest)
    found = {}
    for index in range(len(reader)):
        example = reader.example(index)
        named = {name: values[name][code - 1] if code else None for name, code in example.metadata.items()}
        found[example.input_ids.tobytes()] = named
    return found


def test_examples_have_the_values_of_their_records(folder: Path, tmp_path: Path) -> None:
    reader = CacheReader(folder / "cache")
    assert metadata_values(reader.manifest) == {"category": ["sums"], "language": ["go", "python"]}
    found = list(texts(reader).values())
    assert [sum(row["language"] == name for row in found) for name in LANGUAGES] == [8, 8, 8]
    assert sum(row["category"] == "sums" for row in found) == 5
    assert "            language: 2 values, 'go', 'python'" in render(describe(folder / "cache")).splitlines()
    for name in ("go", "python"):
        alone = make_cache(tmp_path, folder / "teacher", train_data=str(folder / "data.jsonl"),
                           where={"language": [name]}, output=tmp_path / name)  # fmt: skip
        assert {tokens for tokens, row in texts(reader).items() if row["language"] == name} == set(
            texts(CacheReader(alone))
        )


def test_data_without_them_gives_the_cache_it_always_gave(folder: Path, tmp_path: Path) -> None:
    plain = make_cache(tmp_path, folder / "teacher")
    assert "metadata" not in (plain / "zarr.json").read_text()
    with_them, without = folder_bytes(folder / "cache"), folder_bytes(plain)
    changed = {key for key in without if with_them[key] != without[key]}
    assert {key.split("/")[0] for key in changed} == {"zarr.json", "commits", "seal"}
    assert {key.split("/")[0] for key in with_them.keys() - without.keys()} == {"category", "language"}


def test_a_cache_without_them_is_resumed(folder: Path, tmp_path: Path) -> None:
    make_cache(tmp_path, folder / "teacher")
    before = folder_bytes(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/commits/c/0")
    data = str(folder / "data.jsonl")
    settings = precompute_settings(tmp_path, teacher_model=str(folder / "teacher"), train_data=data)
    assert precompute(settings).shards_written == 1
    assert folder_bytes(tmp_path / "cache") == before


def test_other_values_are_another_cache(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    data = [{**record, "language": LANGUAGES[(n + 1) % 3]} for n, record in enumerate(DATA)]
    with pytest.raises(CacheMismatchError, match=r"data\.metadata\.fingerprint"):
        make_cache(tmp_path, folder / "teacher", train_data=str(write_jsonl(tmp_path / "data.jsonl", data)))


def test_copies_and_parts_keep_them(folder: Path, tmp_path: Path) -> None:
    copy_cache(str(folder / "cache"), str(tmp_path / "all.zip"), None)
    copy_cache(str(folder / "cache"), str(tmp_path / "part"), (1, 3))
    whole = texts(CacheReader(folder / "cache"))
    assert texts(CacheReader(tmp_path / "all.zip")) == whole
    part = texts(CacheReader(tmp_path / "part"))
    assert part == {tokens: whole[tokens] for tokens in part}
    for path in (folder / "cache", tmp_path / "all.zip", tmp_path / "part"):
        assert verify(path).problems == []


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (tmp_path / "cache/language/c/1").write_bytes(b"x")
    assert verify(tmp_path / "cache").problems == ["shard 1: language/c/1: bytes differ"]
    with pytest.raises(CacheFormatError, match=r"shard 1 is damaged: language/c/1"):
        CacheReader(tmp_path / "cache").shard(1)


def test_a_code_without_a_value_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    array = zarr.open_group(tmp_path / "cache", mode="r+")["language"]
    assert isinstance(array, zarr.Array)
    array[0] = 3
    commit = tmp_path / "cache/commits/c/0/0"
    record = bytearray(commit.read_bytes())
    record[-32:] = hashlib.sha256((tmp_path / "cache/language/c/0").read_bytes()).digest()
    commit.write_bytes(record)
    with pytest.raises(CacheFormatError, match="language: must be from 0 to 2 for each example"):
        CacheReader(tmp_path / "cache").shard(0)


@pytest.mark.parametrize(
    "values", [{"made_by": ["x"]}, {"language": []}, {"language": ["a\nb"]}, {"language": ["x" * 101]}]
)
def test_a_manifest_with_other_columns_or_values_is_refused(values: object, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    group = json.loads((tmp_path / "cache/zarr.json").read_text())
    group["attributes"]["logitcask"]["data"]["metadata"]["values"] = values
    (tmp_path / "cache/zarr.json").write_text(json.dumps(group))
    with pytest.raises(CacheFormatError, match=r"damaged manifest: data\.metadata"):
        CacheReader(tmp_path / "cache")


def test_a_student_is_trained_and_evaluated_on_some_examples(folder: Path, tmp_path: Path) -> None:
    run = train(folder / "cache", tmp_path / "run", where="language=go,language=python", max_steps=2)
    settings = EvaluateSettings.model_validate(
        {"model": str(run / "final"), "cache": str(folder / "cache"), "device": "cpu"}
    )
    whole = evaluate(settings).on_cache
    go = evaluate(settings.model_copy(update={"where": {"language": ("go",)}})).on_cache
    assert whole is not None
    assert go is not None
    named = {(group.column, group.value): group for group in whole.groups}
    assert [key[1] for key in named] == [None, "sums", None, "go", "python"]
    assert sum(group.positions for group in whole.groups if group.column == "language") == whole.positions
    assert named["language", "go"].examples == go.examples == 8
    assert named["language", "go"].perplexity == pytest.approx(go.perplexity)
    assert named["language", "go"].kl[0].kl == pytest.approx(go.kl[0].kl)
    assert "examples" in rows(evaluate(settings))["language go"]


def test_a_chosen_part_is_what_the_trainer_sees(folder: Path, tmp_path: Path) -> None:
    reader = CacheReader(folder / "cache")
    source = cache_source(reader, DiskCache(tmp_path, 0), soft=True, temperature=1.0, tail="sampled",
                          divergence="forward-kl", min_fidelity=None, same_tokenizer={},
                          where={"language": ("go",)})  # fmt: skip
    chosen = matching(reader, {"language": ["go"]})
    assert (len(source.examples), source.shard_starts[-1], source.amount.examples) == (8, 8, 8)
    lengths = [len(source.examples[n].encoded.input_ids) for n in range(8)]
    assert source.examples.describe([0, 7]) == f"{chosen[0]}, {chosen[7]}"  # their numbers in the whole cache
    assert lengths == source.lengths().tolist() == [len(reader.example(int(n)).input_ids) for n in chosen]
    assert sum(lengths) == source.amount.tokens
    for start, stop in itertools.pairwise(source.shard_starts.tolist()):
        shards = np.searchsorted(reader.shard_starts, chosen[start:stop], side="right")
        assert len(set(shards.tolist())) == 1


def test_where_chooses_examples_or_says_what_there_is(folder: Path) -> None:
    reader = CacheReader(folder / "cache")
    chosen = matching(reader, {"language": ["go"], "category": ["sums"]})
    assert len(chosen) == 2
    assert np.array_equal(matching(reader, {}), np.arange(len(reader)))
    for where, reason in (({"language": ["c"]}, r"language=c: no example has it; there are \['go', 'python'\]"),
                          ({"hard": ["1"]}, "is no column of this cache; it has category, language")):  # fmt: skip
        with pytest.raises(CacheMismatchError, match=reason):
            matching(reader, where)
