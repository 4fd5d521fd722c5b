"""A run reports to Weights & Biases, TensorBoard and trackio at the same time, without a network."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from logitcask.pipeline.runs.run_folder import curve, read_log
from tests.support.forked import alone
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import make_cache

LOSSES = ("total_loss", "hard_loss", "soft_loss", "perplexity")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps with evaluations before, at steps 2 and 3, and after; wandb/ and trackio/ lie next to it."""
    folder = tmp_path_factory.mktemp("reports")
    cache, student = make_cache(folder), write_config(folder / "student.json", STUDENT)
    words = ["train", f"--cache={cache}", f"--student-config={student}", f"--output-dir={folder / 'run'}",
             "--device=cpu", "--max-steps=3", "--logging-steps=1", "--eval-steps=2", "--use-wandb", "--use-tensorboard",
             "--use-trackio", "--wandb-project=ours"]  # fmt: skip
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    ran = alone(folder, words, places)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "rackio" not in ran.stdout
    assert not [line for line in ran.stderr.splitlines() if "Traceback" in line or "WARNING" in line]
    assert f"trackio: run {folder / 'run'}; see it with trackio show --project ours" in ran.stderr
    return folder / "run"


def test_tensorboard_has_every_line_in_one_folder(run: Path) -> None:
    assert len(list((run / "tensorboard").iterdir())) == len(list(run.parent.rglob("events.out.tfevents.*")))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in LOSSES:
        for prefix, ours in (("train/", ""), ("eval/", "eval_")):
            steps, values = curve(read_log(run), ours + name)
            reported = {event.step: event.value for event in events.Scalars(prefix + name)}
            assert sorted(reported) == steps
            assert [reported[step] for step in steps] == pytest.approx(values, rel=1e-6)


def test_wandb_has_every_line(run: Path) -> None:
    (offline,) = run.parent.glob("wandb/offline-run-*")
    lines = wandb_lines(next(offline.glob("*.wandb")))
    compare(run, lines)


def test_trackio_has_every_line_in_one_run(run: Path) -> None:
    with sqlite3.connect(run.parent / "trackio" / "ours.db") as database:
        rows = database.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {str(run)}
    compare(run, [json.loads(text) for _, text in rows])


def compare(run: Path, lines: list[dict[str, float]]) -> None:
    """Require the reported lines to equal those of the run's log."""
    for name in LOSSES:
        for prefix, ours in (("train/", ""), ("eval/", "eval_")):
            steps, values = curve(read_log(run), ours + name)
            reported = {int(line["train/global_step"]): line[prefix + name] for line in lines if prefix + name in line}
            assert sorted(reported) == steps
            assert [reported[step] for step in steps] == pytest.approx(values)


def wandb_lines(file: Path) -> list[dict[str, float]]:
    """Return the history in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2 as messages

    lines, whole = [], b""
    for part, ends in wandb_parts(file.read_bytes()):
        whole += part
        if ends:
            record = messages.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.HasField("history"):
                items = record.history.item
                lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def wandb_parts(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield parts of records, and whether each ends its record: LevelDB's log format after a header of 7 bytes."""
    place, block = 7, 32768
    while place < len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        yield data[place + 7 : place + 7 + size], kind in (1, 4)
        place += 7 + size
