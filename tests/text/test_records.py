"""Files, folders, patterns and saved data sets: the same records in a defined order."""

import bz2
import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numcodecs
import pyarrow
import pyarrow.parquet
import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.columns import RecordError, shape_record
from logitcask.pipeline.text.records import JSON_CHUNK, read_records

RECORDS: list[dict[str, Any]] = [{"prompt": f"question {n}", "response": f"naïve “answer” {n}"} for n in range(5)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(RECORDS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "blank.jsonl": lambda path: path.write_bytes(b"\n" + LINES.replace(b"\n", b"\r\n\n")),
    "a.ndjson": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "a.jsonl.zst": lambda path: path.write_bytes(numcodecs.Zstd().encode(LINES)),
    "array.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "one line.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "a.csv": write_csv,
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(path),
}


def read(*sources: object) -> list[dict[str, Any]]:
    records = [record for _, record in read_records([str(source) for source in sources])]
    return [record for record in records if isinstance(record, dict)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == RECORDS


def test_folders_patterns_and_several_sources_have_an_order(tmp_path: Path) -> None:
    for number, folder in enumerate(("b", "a", "a/deeper", ".hidden")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "part.jsonl").write_text(json.dumps({"text": str(number)}) + "\n")
    (tmp_path / "a" / "README.md").write_text("no data\n")
    texts = [record["text"] for record in read(tmp_path)]
    assert texts == ["2", "1", "0"], "by path; hidden folders and other files are left out"
    assert [record["text"] for record in read(f"{tmp_path}/*/part.jsonl")] == ["1", "0"]
    assert [record["text"] for record in read(tmp_path / "b/part.jsonl", tmp_path / "a")] == ["0", "2", "1"]


def test_places_name_file_and_line(tmp_path: Path) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    assert [where for where, _ in read_records([str(tmp_path / "a.jsonl")])][1] == f"{tmp_path / 'a.jsonl'}:2"


def test_a_large_array_is_read_in_pieces(tmp_path: Path) -> None:
    records = [{"text": "x" * (JSON_CHUNK // 3), "n": n} for n in range(10)]
    (tmp_path / "large.json").write_text(json.dumps(records))
    assert read(tmp_path / "large.json") == records


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.jsonl", b"", "has no examples"),
    ("a.json", b'[{"text": "a"}, {"text": ]', "malformed JSON after record 1"),
    ("a.csv", b"a,b\n\"x", "not a CSV file"),
    ("a.csv", b"a,\xff\xfe\nb,1\n", "not a CSV file in UTF-8"),
    ("a.parquet", b"PAR1nothing", "damaged or not a Parquet file"),
    ("a.jsonl.gz", b"no gzip", "cannot be read|malformed|no examples"),
])  # fmt: skip
def test_damaged_files_are_one_line(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LogitcaskError, match=reason) as told:
        read(tmp_path / name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "content", "where", "reason"), [
    ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl:2", "malformed JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n[1]\n', "a.jsonl:3", "must be a JSON object, got list"),
    ("a.json", b'[{"text": "a"}, 2]', "a.json: record 2", "must be a JSON object, got int"),
    ("a.json", b'[{"text": "a"}, {"text": "b\xff"}]', "a.json: record 2", "is not valid UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n', "a.jsonl:2", "is not valid UTF-8"),
    ("a.csv", b'text\na\nb\xff\n', "a.csv: row 2", "is not valid UTF-8"),
    ("a.csv", b'text\na\nb,c\n', "a.csv: row 2", "has more fields than the 1 columns"),
])  # fmt: skip
def test_what_is_no_record_has_its_place_and_reason(
    name: str, content: bytes, where: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (first, second) = read_records([str(tmp_path / name)])
    assert first[1] == {"text": "a"}
    assert second[0] == str(tmp_path / where)
    assert isinstance(second[1], RecordError)
    assert str(second[1]).startswith(reason)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as of <(zcat …): it could not be read again to resume
    for source, reason in ((tmp_path / "none.jsonl", "no such data file"), (tmp_path / "empty", "without data files"),
                           (tmp_path / "pipe", "a pipe or a device"),
                           (f"{tmp_path}/*.jsonl", "matches no file")):  # fmt: skip
        with pytest.raises(LogitcaskError, match=reason):
            read(source)


@pytest.mark.parametrize("folder", [False, True])
def test_invalid_bytes_in_arrow_are_one_bad_record(folder: bool, tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"b\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"text": texts, "n": [1, 2, 3]})
    place = tmp_path / ("saved" if folder else "a.parquet")
    datasets.Dataset(table).save_to_disk(place) if folder else pyarrow.parquet.write_table(table, place)
    first, second, third = read_records([str(place)])
    assert (first[1], third) == ({"text": "a", "n": 1}, (f"{place}: row 3", {"text": "c", "n": 3}))
    assert second[0] == f"{place}: row 2"
    assert isinstance(second[1], RecordError)
    assert (str(second[1]), second[1].value) == ("is not valid UTF-8", {"text": "b\\xff", "n": 2})


BAD_TEXTS = {"half": "a\ud83d", "null": None, "empty": " ", "nul": "a\0b"}


@pytest.mark.parametrize(("name", "kind"), [
    (name, kind)
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet")
    for kind in BAD_TEXTS
    if kind != "half" or name.startswith("a.json")  # the others hold UTF-8 alone, which has no half pairs
])  # fmt: skip
def test_bad_texts_are_bad_records_in_every_format(name: str, kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": BAD_TEXTS[kind]}]
    place = tmp_path / name
    if name == "a.csv":
        place.write_text("prompt,response\n" + "".join(f"{r['prompt']},{r['response'] or ''}\n" for r in rows))
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place)
    else:
        place.write_text(json.dumps(rows) if name == "a.json" else "".join(json.dumps(r) + "\n" for r in rows))
    first, second = read(place)
    shape_record(first, {})
    with pytest.raises(RecordError, match=r"surrogate|needs messages|is empty|NUL"):
        shape_record(second, {})


def test_a_long_field_of_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert read(tmp_path / "a.csv") == [{"text": "x" * 300_000}]


def test_a_parquet_folder_is_read_in_order(tmp_path: Path) -> None:
    for name, part in (("data/train-1.parquet", RECORDS[2:]), ("data/train-0.parquet", RECORDS[:2])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name)
    assert read(tmp_path) == RECORDS


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    records = read_records([str(tmp_path / "a.jsonl")])
    next(records)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(LINES)
    with pytest.raises(LogitcaskError, match="changed while it was read"):
        list(records)


def test_splits_of_saved_data_sets_are_named(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [record for _, record in read_records([str(tmp_path / "saved")], split="test")] == [{"text": "test"}]
    with pytest.raises(LogitcaskError, match="has no split 'dev': give --data-split, one of train, test"):
        list(read_records([str(tmp_path / "saved")], split="dev"))


@pytest.mark.parametrize("folder", [False, True])
def test_arrows_filling_of_arguments_is_no_part_of_a_call(folder: bool, tmp_path: Path) -> None:
    """A column has one type, so each call gets a null for every argument that another call has."""
    calls = [{"name": "plus", "arguments": {"a": 1}}, {"name": "say", "arguments": {"text": "x"}}]
    chats = [[{"role": "assistant", "content": None, "tool_calls": [{"function": call}]}] for call in calls]
    table = pyarrow.Table.from_pylist([{"messages": chat, "note": None} for chat in chats])
    place = tmp_path / ("saved" if folder else "a.parquet")
    datasets.Dataset(table).save_to_disk(place) if folder else pyarrow.parquet.write_table(table, place)
    read = [record for _, record in read_records([str(place)]) if isinstance(record, dict)]
    made = [shape_record(record, {}).messages[0]["tool_calls"][0]["function"] for record in read]
    assert made == calls
