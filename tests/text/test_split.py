"""logitcask split: sizes, duplicates on one side, and an assignment that depends on the text and the seed alone."""

import json
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.split import split_data
from tests.support.tiny import write_jsonl


def records(count: int) -> list[dict[str, object]]:
    return [{"prompt": f"question {n % 97} of {n % 10}?", "response": f"answer {n}"} for n in range(count)]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_every_record_is_on_one_side_in_order(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", records(500))
    found = split_data(Reading((str(data),)), tmp_path / "out", 50, 0)
    assert (found.train_examples, found.test_examples) == (450, 50)
    assert sorted(lines(found.train) + lines(found.test)) == sorted(lines(data))
    order = {line: number for number, line in enumerate(lines(data))}
    for file in (found.train, found.test):
        places = [order[line] for line in lines(file)]
        assert places == sorted(places)
    other = split_data(Reading((str(data),)), tmp_path / "other", 50, 1)
    assert lines(other.test) != lines(found.test)


def test_duplicates_stay_together_whatever_their_ids(tmp_path: Path) -> None:
    twice = [{**record, "id": f"{copy}-{n}"} for copy in range(3) for n, record in enumerate(records(100))]
    found = split_data(Reading((str(write_jsonl(tmp_path / "data.jsonl", twice)),)), tmp_path / "out", 31, 0)
    assert found.test_examples == 33, "whole groups of three"
    sides = [{json.loads(line)["response"] for line in lines(file)} for file in (found.train, found.test)]
    assert not sides[0] & sides[1]


def test_more_data_moves_few_records(tmp_path: Path) -> None:
    first = split_data(Reading((str(write_jsonl(tmp_path / "a.jsonl", records(1000))),)), tmp_path / "a", 100, 0)
    more = split_data(Reading((str(write_jsonl(tmp_path / "b.jsonl", records(1100))),)), tmp_path / "b", 110, 0)
    assert len(set(lines(first.test)) - set(lines(more.test))) < 15


def test_all_bad_records_are_reported_at_once_or_left_out(tmp_path: Path) -> None:
    good = [json.dumps({"question": record["prompt"], "response": record["response"]}) for record in records(300)]
    broken = [
        '{"question": "a"',
        "[1]",
        '{"question": "b", "response": ""}',
        '{"question": "c", "response": "\\ud800"}',
    ]
    data = tmp_path / "data.jsonl"
    data.write_bytes("\n".join([*good[:100], *broken, *good[100:]]).encode() + b'\n{"question": "\xff"}\n')
    reading = Reading((str(data),), renamed={"question": "prompt"})
    with pytest.raises(LogitcaskError) as refused:
        split_data(reading, tmp_path / "out", 30, 0)
    said, kept = str(refused.value), tmp_path / "out.skipped.jsonl"
    assert said.startswith("5 bad records of 305: 1 x malformed JSON")
    assert f"response is empty: a response needs text: {data}:103" in said
    assert [json.loads(line)["where"].rpartition(":")[2] for line in lines(kept)] == ["101", "102", "103", "104", "305"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(LogitcaskError, match=r"5 bad records of 305: .*more than --max-bad 1"):
        split_data(reading, tmp_path / "out", 30, 0, 0.01)
    done = split_data(reading, tmp_path / "out", 30, 0, 0.02)
    assert (done.train_examples, done.test_examples) == (270, 30)
    assert sorted(lines(done.train) + lines(done.test)) == sorted(good)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "data.jsonl", records(10)))
    with pytest.raises(LogitcaskError, match="--test 10: the data has 10 examples"):
        split_data(Reading((data,)), tmp_path / "out", 10, 0)
    split_data(Reading((data,)), tmp_path / "out", 3, 0)
    with pytest.raises(LogitcaskError, match="already exists"):
        split_data(Reading((data,)), tmp_path / "out", 3, 0)
