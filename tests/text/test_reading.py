"""What is taken of the data: configurations and splits of the hub, values of columns; files that changed are named."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.reading import Reading, changed_files, record_files
from tests.support.mistakes import said
from tests.support.servers import hf_environment, hf_server
from tests.support.tiny import RECORDS, make_cache, make_teacher, write_jsonl

CARD = """---
configs:
- config_name: code
  data_files:
  - {split: train, path: code/train.jsonl}
  - {split: test, path: code/test.jsonl}
- config_name: prose
  data_files: prose.jsonl
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def port(hub: Path) -> Iterator[int]:
    repository = hub / "mirrors/datasets/me/texts"
    for name in ("code/train", "code/test", "prose"):
        write_jsonl(repository / f"{name}.jsonl", [{"prompt": f"{n} of", "response": name} for n in range(4)])
    (repository / "README.md").write_text(CARD)
    subprocess.run(["git", "init", "-q", "-b", "main", repository], check=True)
    commit(repository)
    with hf_server(hub) as port:
        yield port


def commit(repository: Path) -> None:
    git = ["git", "-C", str(repository), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for command in (["add", "-A"], ["commit", "-q", "-m", "Texts"]):
        subprocess.run([*git, *command], check=True)


def split(port: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hf_environment(port, folder / "home")}
    command = [sys.executable, "-m", "logitcask", "split", "--data", "me/texts", "--output-dir", str(folder / "out")]
    return subprocess.run(
        [*command, "--test", "1", *options], capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def test_a_configuration_and_a_split_of_the_hub(port: int, tmp_path: Path) -> None:
    done = split(port, tmp_path, "--data-config", "code", "--data-split", "test")
    assert done.returncode == 0, done.stderr
    lines = [line for name in ("train", "test") for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]
    assert sorted(json.loads(line)["prompt"] for line in lines) == ["0 of", "1 of", "2 of", "3 of"]
    assert {json.loads(line)["response"] for line in lines} == {"code/test"}


@pytest.mark.parametrize(("options", "reason"), [
    (["--data-config", "verse"], "has no configuration 'verse': give --data-config, one of code, prose"),
    ([], "has several configurations: give --data-config, one of code, prose"),
    (["--data-config", "code", "--data-split", "dev"], "has no split 'dev': give --data-split, one of train, test"),
])  # fmt: skip
def test_what_the_hub_has_not_is_named(port: int, options: list[str], reason: str, tmp_path: Path) -> None:
    refused = split(port, tmp_path, *options)
    assert refused.returncode == 2
    assert reason in said(refused.stderr)


def test_options_that_no_source_can_use_are_refused(tmp_path: Path) -> None:
    data = (str(write_jsonl(tmp_path / "a.jsonl", RECORDS)),)
    with pytest.raises(LogitcaskError, match="--data-config x: applies to data sets of the hub"):
        Reading(data, config="x")
    with pytest.raises(LogitcaskError, match="--data-split x: applies to"):
        Reading(data, split="x")


def test_where_takes_records_by_their_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"{n}", "lang": ("python", "go", "c")[n % 3], "hard": n} for n in range(6)
    ]
    data = str(write_jsonl(tmp_path / "a.jsonl", rows))

    def taken(where: dict[str, list[str]]) -> list[str]:
        records = Reading((data,), where=where, renamed={"lang": "language"})(data)
        return [record["text"] for _, record in records if isinstance(record, dict)]

    assert taken({"language": ["python"]}) == ["0", "3"]
    assert taken({"language": ["python", "go"]}) == ["0", "1", "3", "4"]
    assert taken({"language": ["go"], "hard": ["4"]}) == ["4"]
    with pytest.raises(LogitcaskError, match=r"no record has --where language=rust; there are .*'python'"):
        taken({"language": ["rust"]})


def test_a_file_that_changed_since_the_first_run_is_named(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"data/{n}.jsonl", RECORDS[8 * n : 8 * n + 8]) for n in range(3)]
    cache = make_cache(tmp_path, train_data=str(tmp_path / "data"))
    assert make_cache(tmp_path, tmp_path / "teacher", train_data=str(tmp_path / "data")) == cache
    write_jsonl(files[1], RECORDS[9:16])
    write_jsonl(tmp_path / "data/3.jsonl", RECORDS[:1])
    with pytest.raises(CacheMismatchError) as told:
        make_cache(tmp_path, tmp_path / "teacher", train_data=str(tmp_path / "data"))
    assert f"since the first run {files[1]} changed, {tmp_path / 'data/3.jsonl'} is new" in str(told.value)
    assert str(files[0]) not in str(told.value)


def test_a_data_set_of_the_hub_that_changed_since_the_first_run_is_named(port: int, hub: Path, tmp_path: Path) -> None:
    """Beside a file that did not; and an option that did is not taken for the data."""
    make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    program = (
        "import sys; from pathlib import Path; from logitcask.cache.errors import LogitcaskError\n"
        "from logitcask.pipeline.precompute.precompute import precompute\n"
        "from tests.support.tiny import precompute_settings, write_jsonl; from tests.text.test_reading import commit\n"
        "data = ['train.jsonl', 'me/texts']\n"
        "def run(**more):\n"
        "    try: precompute(precompute_settings(Path(), train_data=data, data_config='prose', **more))\n"
        "    except LogitcaskError as error: print(error)\n"
        "    else: print('done')\n"
        "run(); run(); run(prompt_loss=True)\n"
        "write_jsonl(Path(sys.argv[1], 'prose.jsonl'), [{'prompt': 'a', 'response': 'b'}])\n"
        "commit(Path(sys.argv[1])); run()\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, **hf_environment(port, tmp_path / "home"), "PYTHONPATH": f"{root}:{root}/src"}
    command = [sys.executable, "-c", program, str(hub / "mirrors/datasets/me/texts")]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    said = run.stdout.splitlines()
    assert said[:2] == ["done", "done"], run.stderr
    assert said[2].endswith("; the data did not change since: an option did")
    assert said[-1].endswith("; since the first run me/texts changed"), run.stdout
    assert list(json.loads((tmp_path / "cache.files.json").read_text())) == ["train.jsonl", "me/texts"]


def test_bad_records_are_counted_by_kind_of_reason(tmp_path: Path) -> None:
    bad = BadRecords(tmp_path / "bad.jsonl")
    for number in range(7):
        bad.add(f"a.jsonl:{number}", f"half a pair, at character {number}", {"n": number})
    bad.add("a.jsonl:9", "text is empty", {"text": ""})
    with pytest.raises(LogitcaskError) as told, bad:
        pass
    assert "7 x half a pair, at character N: a.jsonl:0 ({'n': 0}), " in str(told.value)
    assert "a.jsonl:4" in str(told.value)
    assert "a.jsonl:5" not in str(told.value)
    assert "1 x text is empty: a.jsonl:9" in str(told.value)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 8


def test_for_a_cache_at_a_url_nothing_is_left_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    record_files("s3://bucket/cache", Reading((str(data),)))
    assert os.listdir(tmp_path) == ["data.jsonl"]
    assert changed_files("s3://bucket/cache", Reading((str(data),))) == ""
    record_files(tmp_path / "cache", Reading((str(data),)))
    assert sorted(os.listdir(tmp_path)) == ["cache.files.json", "data.jsonl"]
