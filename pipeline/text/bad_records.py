"""What is reported of records: bad ones, all at once or skipped and kept in a file; and notices."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from logitcask.cache.errors import LogitcaskError, first_line, shown
from logitcask.pipeline.console import say

SHOWN = 5  # of each reason
REASONS_SHOWN = 5
NUMBER = re.compile(r"-?\d+")  # reasons that differ only in numbers count as one
PROMPT, ONE = "prompt and response", "chats of one turn"
WHOLE, EACH, LAST = "chats, whole", "chats, one example per turn", "chats, the last answer"


def skipped_file(output: Path | str) -> Path:
    """Return where the bad records of a run are kept: beside its output, or in the current folder if that is a URL."""
    if "://" in str(output):
        return Path(f"{str(output).rstrip('/').rsplit('/', maxsplit=1)[-1]}.skipped.jsonl")
    return Path(output).with_name(f"{Path(output).name}.skipped.jsonl")


class BadRecords:
    """Collects bad records while data is read; as a context it decides, at the end, whether they are too many.

    ``most`` is the greatest share of all records that may be skipped, 0 for none. Each goes to ``file``, if given, as a
    line of JSON; the file is there only if there are any. Memory: a few lines per reason. If not ``decides``, the
    caller calls ``settle`` itself.
    """

    def __init__(self, file: Path | None, most: float = 0.0, *, decides: bool = True) -> None:
        self._file, self._most, self._decides = file, most, decides
        self._out: IO[str] | None = None
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}
        self._said: dict[str, str] = {}  # the reason itself, or its kind if its numbers differ
        self.read = 0

    @property
    def count(self) -> int:
        """The bad records so far."""
        return self._counts.total()

    def by_reason(self) -> dict[str, int]:
        """Return the number of bad records by reason, the most frequent first."""
        return {self._said[kind]: count for kind, count in self._counts.most_common()}

    def add(self, where: str, reason: str, record: Any) -> None:
        """Take a bad record."""
        if self._file is not None:
            line = json.dumps({"where": where, "reason": reason, "record": record}, default=str)
            try:
                self._write(self._file, line + "\n")
            except OSError as fault:
                raise LogitcaskError(f"{self._file}: bad records cannot be written: {first_line(fault)}") from fault
        kind = NUMBER.sub("N", reason)
        self._counts[kind] += 1
        self._said[kind] = reason if self._said.get(kind, reason) == reason else kind
        examples = self._first.setdefault(kind, [])
        if len(examples) < SHOWN:
            examples.append(f"{where} ({shown(record, 60)})")

    def _write(self, file: Path, line: str) -> None:
        if self._out is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._out = file.open("w", encoding="utf-8")
        self._out.write(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._out is not None:
            self._out.close()
        if error is None and self._decides:
            self.settle()

    def settle(self) -> None:
        """Report the bad records. Raises LogitcaskError if they are too many."""
        if self.count > self._most * self.read:
            raise LogitcaskError(self._refusal())
        if self.count:
            say(f"{self.count:,} of {self.read:,} records: {self._reasons(1)}{self._place}", "skipped")

    def _refusal(self) -> str:
        remedy = "fix them, or pass --on-bad-record skip"
        if self._most:
            remedy = f"more than --max-bad {self._most:.3%}: fix them, or raise it"
        return f"{self.count:,} bad records of {self.read:,}: {self._reasons(SHOWN)}{self._place}; {remedy}"

    @property
    def _place(self) -> str:
        return f"; all of them: {self._file}" if self._file else ""

    def _reasons(self, examples: int) -> str:
        shown_reasons = [
            f"{count:,} x {self._said[kind]}: {', '.join(self._first[kind][:examples])}"
            for kind, count in self._counts.most_common(REASONS_SHOWN)
        ]
        more = len(self._counts) - len(shown_reasons)
        return "; ".join(shown_reasons) + (f"; and {more} more reasons" if more > 0 else "")


@dataclass
class Notices:
    """What encoding found out beside the examples; those of several encoders are merged."""

    records: Counter[str] = field(default_factory=Counter)  # by shape
    examples: Counter[str] = field(default_factory=Counter)  # by shape of their record
    refused_chats: int = 0
    said: dict[str, None] = field(default_factory=dict)  # lines, in order, each once
    date: str | None = None  # the day that a template wrote, YYYY-MM-DD

    def count(self, shape: str, examples: int) -> None:
        """Count a record and its examples."""
        self.records[shape] += 1
        self.examples[shape] += examples

    def add(self, line: str, report: Callable[[str], None]) -> None:
        """Take a line, and report it the first time."""
        if line not in self.said:
            self.said[line] = None
            report(line)

    def merge(self, other: "Notices", report: Callable[[str], None]) -> None:
        """Take what another encoder found out, and report what is new."""
        self.records += other.records
        self.examples += other.examples
        self.refused_chats += other.refused_chats
        self.date = self.date or other.date
        for line in other.said:
            self.add(line, report)

    def chats(self) -> str:
        """Return a line on the chats of several turns, empty if there are none."""
        whole, cut, last = (self.records[shape] for shape in (WHOLE, EACH, LAST))
        parts = [f"{whole:,} whole, {cut:,} cut into {self.examples[EACH]:,} examples of a turn each"]
        parts += [f"{last:,} cut to the last answer"] if last else []
        parts += [f"{self.refused_chats:,} refused"] if self.refused_chats else []
        return f"chats of several turns: {', '.join(parts)}" if whole + cut + last else ""
