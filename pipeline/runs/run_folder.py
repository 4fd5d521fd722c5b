"""The folder of a run of stage 2: its log, settings and evaluations. Does not import torch."""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import SafetensorError

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.evaluation import EVALUATION_FILE, Evaluation, parse_evaluation
from logitcask.pipeline.settings.training.loss import ALPHAS

LOG_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"
ENDS_FILE = "metrics.json"  # the evaluations before and after
FINAL = "final"

Line = dict[str, float | None]
DIVERGENCES = {"forward-kl": "KL", "reverse-kl": "reverse KL", "jsd": "JSD", "tvd": "TVD"}


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file with sorted keys, atomically, even if the power fails."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def step_of(checkpoint: Path) -> int | None:
    """Return the optimizer step in the name of a checkpoint's folder, None if it is not a name that a run gives."""
    name = re.fullmatch(r"checkpoint-([0-9]+)", checkpoint.name)
    return None if name is None else int(name[1])


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints in a run's folder, ascending by step; folders of other names do not count."""
    folders = [(step, folder) for folder in run.glob("checkpoint-*") if (step := step_of(folder)) is not None]
    return [folder for _, folder in sorted(folders) if (folder / SETTINGS_FILE).is_file()]


def latest_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint with the most steps in a run's folder, None if there is none."""
    return max(complete_checkpoints(run), key=lambda folder: step_of(folder) or 0, default=None)


@contextlib.contextmanager
def explain_save_errors(output: Path) -> Iterator[None]:
    """Turn a failed write into the run's folder into a LogitcaskError that says how to resume."""
    try:
        yield
    except FileNotFoundError as error:  # as of watch_folder
        reason = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
        raise LogitcaskError(
            f"{output}: cannot save: {reason}: mount or move the folder back, then resume with "
            "--resume-from-checkpoint latest, or start over without it if there is no checkpoint yet"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # raised by torch.save
            raise
        checkpoint = latest_checkpoint(output)
        then = (
            f"resume with --resume-from-checkpoint {checkpoint}" if checkpoint else "remove the folder and start over"
        )
        raise LogitcaskError(
            f"{output}: cannot save: {error} ({shutil.disk_usage(output).free:,} bytes are free there): make room, "
            f"then {then}"
        ) from error


def source_of(model: Path) -> str | None:
    """Return the identity of the cache or data that a student in ``final`` was trained on, None if it is not known."""
    try:
        settings: Any = json.loads((model / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(settings["source"]) if isinstance(settings, dict) and "source" in settings else None


def divergence_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a run's soft loss from its resolved settings, with the tail unless it is ``sampled``."""
    divergence, tail = str(settings.get("divergence")), settings.get("tail")
    name = str(settings.get("loss") or DIVERGENCES.get(divergence, divergence))
    return name if tail in ("sampled", "exact") else f"{name} (tail {tail})"


def with_alpha(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings with the alpha it had, if it was left to the approach."""
    default = ALPHAS.get(str(settings.get("distillation_type")))
    return {**settings, **({"alpha": default} if settings.get("alpha") is None else {})}


def read_log(run: Path) -> list[Line]:
    """Return the lines of a run's ``metrics.jsonl``, in order: ``step`` and logged values, None if non-finite.

    An incomplete last line, left by a run that was killed, is skipped. Raises LogitcaskError if the log is missing or
    damaged.
    """
    file = run / LOG_FILE
    text = _text(file)
    lines: list[Line] = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not _is_line(values):
            raise LogitcaskError(
                f"{file}: line {number} is damaged: must be an object of numbers with a step: remove it"
            )
        lines.append(values)
    return lines


def _is_line(values: Any) -> bool:
    """Return whether a value is an object of numbers whose step is a count."""
    return (
        isinstance(values, dict)
        and type(values.get("step")) is int
        and values["step"] >= 0
        and all(value is None or type(value) is float or _is_count(value) for value in values.values())
    )


def _is_count(value: Any) -> bool:
    """Return whether a value is an integer that a float can hold."""
    return type(value) is int and abs(value) <= 2**53


def curve(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Return steps, ascending, and values of one quantity; the last of several lines of a step counts."""
    points = {int(line["step"] or 0): value for line in lines if (value := line.get(name)) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def first_evaluation(log: Sequence[Line]) -> Line:
    """Return the evaluation before the first step, without step and time; empty if the run made none."""
    return {k: v for line in log if line["step"] == 0 for k, v in line.items() if k.startswith("eval_")}


def read_before(run: Path) -> dict[str, float] | None:
    """Return the evaluation before the first step from the log of a run to resume, None if there is none.

    Only a perplexity can be non-finite in a log of finite losses: it is infinite.
    """
    log = read_log(run) if (run / LOG_FILE).exists() else []
    values = {name: math.inf if value is None else value for name, value in first_evaluation(log).items()}
    return {**values, "epoch": 0} if values else None


def ends_table(
    before: Mapping[str, float] | None, after: Mapping[str, float], temperature: float, divergence: str
) -> Table:
    """Return the table of the evaluations before and after a run, with the teacher's where its labels give them."""
    table = Table("held out", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    rows = ends_rows(before, after, temperature, divergence)
    for name in ("before", "after", "teacher")[: 3 if any(row[3] for row in rows) else 2]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    return table


def ends_rows(
    before: Mapping[str, float] | None, after: Mapping[str, float], temperature: float, divergence: str
) -> list[tuple[str, ...]]:
    """Return the rows of that table: name, before, after, the teacher's."""
    rows = {"perplexity": ("eval_perplexity", 1.0), "hard loss, nats": ("eval_hard_loss", 1.0)}
    if ":" in divergence:  # a loss of one's own, module:function
        rows[divergence] = ("eval_soft_loss", 1.0)
    elif after["eval_teacher_captured_mass"]:
        unit = "" if divergence.startswith(DIVERGENCES["tvd"]) else ", nats"
        rows[f"{divergence} to the teacher at T={temperature:g}{unit}"] = ("eval_soft_loss", temperature**-2)
    table = []
    for name, (key, factor) in rows.items():
        teacher = after.get(key.replace("eval_", "eval_teacher_"))
        ends = [None if before is None else before[key] * factor, after[key] * factor, teacher]
        table.append((name, *("" if value is None else f"{value:,.3f}" for value in ends)))
    return table


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    settings: dict[str, Any]  # resolved, as stored in final/
    log: list[Line]
    before: dict[str, float]  # evaluation of the held-out examples; empty if none are held out
    after: dict[str, float]
    evaluation: Evaluation | None  # by logitcask evaluate, if its --output lies in the run's folder
    best: dict[str, float] | None = None  # step and eval_total_loss of the best evaluation, if the run watched for it


def read_run(path: Path) -> Run:
    """Read a finished run. Raises LogitcaskError if a part of it is missing or damaged."""
    log = read_log(path)
    settings, ends = with_alpha(_object(path / FINAL / SETTINGS_FILE)), _object(path / ENDS_FILE)
    before: Any = ends.get("before")
    after: Any = ends.get("after")
    if before is None:  # a run without held-out examples, or one that an earlier version resumed
        before = first_evaluation(log)
    best: Any = ends.get("best")
    whole = all(
        isinstance(part, dict) and all(v is None or type(v) in (int, float) for v in part.values())
        for part in (before, after)
    )
    if best is not None:
        whole &= isinstance(best, dict) and type(best.get("step")) is int and type(best.get("eval_total_loss")) is float
    if not whole:
        raise LogitcaskError(
            f"{path / ENDS_FILE}: damaged: before, after and best must hold numbers: run the training again"
        )
    before, after = ({k: v for k, v in part.items() if k.startswith("eval_")} for part in (before, after))
    file = path / EVALUATION_FILE
    evaluation = parse_evaluation(_text(file), str(file)) if file.exists() else None
    return Run(path, settings, log, before, after, evaluation, best)


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return names of runs: their folders' if all differ, else paths. Raises LogitcaskError if a run is given twice."""
    whole = [path.resolve() for path in runs]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise LogitcaskError(f"{twice}: this run is given twice: name each run once")
    short = [path.name for path in whole]
    return short if len(set(short)) == len(short) else [str(path) for path in runs]


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LogitcaskError(f"{file}: damaged: must be a JSON object: run the training again")
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LogitcaskError(f"{file}: missing: not the folder of a run, or the run has not got this far") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LogitcaskError(f"{file}: cannot be read: {error}: give the folder of a run") from error
