"""What the folder of a run of stage 2 tells: its log, its settings, its evaluations. Knows no torch."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.evaluation import EVALUATION_FILE, Evaluation, parse_evaluation

LOG_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"
ENDS_FILE = "metrics.json"  # the evaluations before and after
FINAL = "final"

Line = dict[str, float | None]
DIVERGENCES = {"forward-kl": "KL", "reverse-kl": "reverse KL", "jsd": "JSD"}


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, keys in order: whole or not at all, even if the power fails."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps in a run's folder, None if there is none."""
    complete = [folder for folder in run.glob("checkpoint-*") if (folder / SETTINGS_FILE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


def divergence_name(settings: Mapping[str, Any]) -> str:
    """What a run's soft loss is, by its resolved settings; with the tail, where it is not ``sampled``."""
    found, tail = settings.get("divergence"), settings.get("tail")
    name = DIVERGENCES.get(str(found), str(found))
    return name if tail == "sampled" else f"{name} (tail {tail})"


def read_log(run: Path) -> list[Line]:
    """The lines of a run's ``metrics.jsonl``, in order: ``step`` and what was logged, None where it was not finite.

    A last line that was cut off, by a run that was killed, is left out. Raises LogitcaskError where there is no log, or
    it is damaged.
    """
    file = run / LOG_FILE
    text = _text(file)
    found: list[Line] = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not _is_line(values):
            raise LogitcaskError(f"{file}: line {number} is damaged: not an object of numbers with a step: remove it")
        found.append(values)
    return found


def _is_line(values: Any) -> bool:
    """Whether a value is an object of numbers, its step a whole one."""
    return (
        isinstance(values, dict)
        and type(values.get("step")) is int
        and all(value is None or type(value) in (int, float) for value in values.values())
    )


def curve(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, ascending; of several lines of a step the last counts."""
    points = {int(line["step"] or 0): value for line in lines if (value := line.get(name)) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    settings: dict[str, Any]  # resolved, as final/ has them
    log: list[Line]
    before: dict[str, float]  # evaluation of the held-out examples; empty where none are held out
    after: dict[str, float]
    evaluation: Evaluation | None  # by logitcask evaluate, where its --output lies in the run's folder


def read_run(path: Path) -> Run:
    """A finished run. Raises LogitcaskError where a part of it is missing or damaged."""
    log = read_log(path)
    settings, ends = _object(path / FINAL / SETTINGS_FILE), _object(path / ENDS_FILE)
    before: Any = ends.get("before")
    after: Any = ends.get("after")
    if before is None:  # a resumed run evaluates only at its end
        before = {name: value for line in log if line["step"] == 0 for name, value in line.items()}
    for part in (before, after):
        if not (isinstance(part, dict) and all(v is None or type(v) in (int, float) for v in part.values())):
            raise LogitcaskError(f"{path / ENDS_FILE}: damaged: before and after must hold numbers: run it again")
    before, after = ({k: v for k, v in part.items() if k.startswith("eval_")} for part in (before, after))
    file = path / EVALUATION_FILE
    evaluation = parse_evaluation(_text(file), str(file)) if file.exists() else None
    return Run(path, settings, log, before, after, evaluation)


def run_names(runs: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's where those differ, else its path. Raises LogitcaskError for one told twice."""
    whole = [path.resolve() for path in runs]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise LogitcaskError(f"{twice}: this run is given twice: name each run once")
    short = [path.name for path in whole]
    return short if len(set(short)) == len(short) else [str(path) for path in runs]


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LogitcaskError(f"{file}: damaged: must be a JSON object: run the training again")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LogitcaskError(f"{file}: missing: not the folder of a run, or one that did not get so far") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LogitcaskError(f"{file}: cannot be read: {error}: give the folder of a run") from error
