"""Run the parts of the check one after another, each within its share of ten minutes; write one JSON and one table.

What the machine lacks is named first. A part whose packages are missing, or whose time is up, is left out and named.
Nothing is fetched. Run as ``bash tests/gpu/check.sh``.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.machine import choose_device, device_name
from tests.gpu.rows import Figure, Place, Row, free, reason

LOWEST = Path(__file__).parents[2] / "configs" / "lowest.txt"
MODELS = ("numpy", "accelerate", "transformers", "pydantic", "pyyaml", "safetensors")
BOTH_STAGES = (*MODELS, "rich", "zarr", "numcodecs", "datasets")


@dataclass(frozen=True)
class Part:
    """A part of the check: ``module:function`` yields its rows."""

    name: str
    rows: str
    needs: tuple[str, ...]
    seconds: int  # its share; what an earlier part leaves is added


PARTS = (
    Part("sparsify", "correctness:sparsified", ("numpy", "transformers"), 20),
    Part("loss against float64", "correctness:losses", ("numpy", "transformers"), 60),
    Part("collator and transfer", "correctness:transferred", MODELS, 20),
    Part("both stages, as the commands run them", "stages:both_stages", BOTH_STAGES, 80),
    Part("stage 1 of real sizes", "stages:teachers", BOTH_STAGES, 70),
    Part("capture against a bare forward pass", "figures:captures", BOTH_STAGES, 60),
    Part("loss against cross-entropy and full logits", "figures:loss_costs", ("numpy", "transformers"), 120),
    Part("whole steps", "figures:steps", MODELS, 80),
    Part("reading the cache beside a step", "figures:loading", BOTH_STAGES, 30),
    Part("torch.compile", "figures:compiled", MODELS, 40),
)


@dataclass
class Report:
    """What is known so far; written after each row, so that a run that is killed leaves it."""

    output: Path
    head: dict[str, Any]
    rows: list[tuple[str, Row]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def write(self) -> str:
        """Write ``check.json`` and ``check.md``; return the latter's text."""
        rows = [{"part": part, "row": r.name, "passed": r.passed, "figures": dict(r.figures)} for part, r in self.rows]
        document = {**self.head, "rows": rows, "left_out": self.left_out}
        text = markdown(self.head, self.rows, self.left_out)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "check.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.output / "check.md").write_text(text)
        return text


def markdown(head: dict[str, Any], rows: Sequence[tuple[str, Row]], left_out: Sequence[str]) -> str:
    """Return the report as Markdown: a table per part, with both numbers of each ratio."""
    facts = ", ".join(f"{name} {value}" for name, value in head["versions"].items())
    lines = [f"# GPU check: {head['device']}, {head['date']}", "", f"{head['machine']}; {facts}.", ""]
    lines += [f"- {problem}" for problem in head["problems"]] + [""] * bool(head["problems"])
    for part in dict.fromkeys(name for name, _ in rows):
        own = [row for name, row in rows if name == part]
        columns = list(dict.fromkeys(column for row in own for column in row.figures))
        lines += [f"## {part}", "", "| | right | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for row in own:
            passed = {None: "", True: "yes", False: "**no**"}[row.passed]
            cells = [shown(row.figures.get(column)) for column in columns]
            lines.append(f"| {row.name} | {passed} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *(["Left out:", "", *(f"- {each}" for each in left_out), ""] if left_out else [])])


def shown(figure: Figure) -> str:
    """Return a figure as a cell of the table."""
    return "–" if figure is None else figure if isinstance(figure, str) else f"{figure:,.4g}"


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def problems(lowest: str) -> dict[str, str]:
    """Return what is wrong with each package that is missing or too old, by the list of lowest versions."""
    found = {}
    for line in lowest.splitlines():
        name, _, least = line.partition("==")
        if not least:
            continue
        own = installed(name)
        if own is None:
            found[name] = f"{name} is missing"
        elif Version(own) < Version(least):
            found[name] = f"{name} {own} is older than {least}: what needs it may fail"
    return found


def rows_of(part: Part, place: Place) -> Iterator[Row]:
    """Yield a part's rows."""
    module, _, name = part.rows.partition(":")
    yield from getattr(importlib.import_module(f"tests.gpu.{module}"), name)(place)


def run_part(part: Part, place: Place, until: float, report: Report, old: Sequence[str]) -> None:
    """Add a part's rows to the report, until its time is up; an error is a row that did not pass."""
    rows = rows_of(part, place)
    while time.monotonic() < until:
        try:
            row = next(rows)
        except StopIteration:
            return
        except torch.OutOfMemoryError as error:
            report.left_out.append(f"{part.name}: {reason(error)}")
            return
        except Exception as error:  # whatever a device does: the other parts still run
            if old or isinstance(error, ModuleNotFoundError):
                report.left_out.append(f"{part.name}: {reason(error)}{'; ' if old else ''}{', '.join(old)}")
            else:
                report.rows.append((part.name, Row(f"stopped: {reason(error)}", passed=False)))
            return
        finally:
            free(place.device)
        report.rows.append((part.name, row))
        report.write()
        figures = ", ".join(f"{name} {shown(value)}" for name, value in row.figures.items())
        print(f"{part.name}: {row.name}: {figures}{'' if row.passed is not False else '  WRONG'}", flush=True)
    report.left_out.append(
        f"{part.name}: its time was up after {sum(name == part.name for name, _ in report.rows)} rows"
    )


def run(device: str, output: Path, *, tiny: bool, minutes: float = 9.5) -> Report:
    """Run all parts and return the report."""
    place_device = choose_device(device)
    lacking = problems(LOWEST.read_text())
    head = {
        "device": device_name(place_device),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, CUDA {torch.version.cuda or 'none'}",
        "tiny": tiny,
        "versions": {name: found for name in ("torch", "transformers", "accelerate") if (found := installed(name))},
        "problems": list(lacking.values()),
    }
    print("\n".join([f"{head['device']}, {head['machine']}", *lacking.values()]), flush=True)
    report = Report(output, head)
    began, shares = time.monotonic(), sum(part.seconds for part in PARTS)
    watchdog = threading.Timer(minutes * 60 + 15, lambda: stop(report))  # a row may begin at the end of its share
    watchdog.daemon = True
    watchdog.start()
    try:
        for number, part in enumerate(PARTS):
            missing = [lacking[name] for name in part.needs if name in lacking and installed(name) is None]
            if missing:
                report.left_out.append(f"{part.name}: {', '.join(missing)}")
                continue
            share = sum(each.seconds for each in PARTS[: number + 1]) / shares
            old = [lacking[name] for name in part.needs if name in lacking]
            with tempfile.TemporaryDirectory() as folder:
                place = Place(place_device, tiny, Path(folder))
                run_part(part, place, began + 60 * minutes * share, report, old)
    finally:
        watchdog.cancel()
    return report


def stop(report: Report) -> None:
    """Write what there is and end the process: a part hangs."""
    report.left_out.append("everything after it: the ten minutes were up within a row")
    print(report.write(), flush=True)
    os._exit(1)


def main() -> None:
    """Run the check; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="everything small, for a test of the check itself")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"))
    given = parser.parse_args()
    try:
        report = run(given.device, given.output, tiny=given.tiny)
    except LogitcaskError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(report.write())
    wrong = [f"{part}: {row.name}" for part, row in report.rows if row.passed is False]
    print(f"written to {given.output}/check.json and check.md; wrong: {'; '.join(wrong) or 'nothing'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
