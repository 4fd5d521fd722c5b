"""Records that cannot be used: all of them are reported at once, or skipped and kept in a file."""

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.console import say

SHOWN = 5  # of each reason
REASONS_SHOWN = 5


def skipped_file(output: Path | str) -> Path:
    """Return where the bad records of a run are kept: beside its output, or in the current folder if that is a URL."""
    if "://" in str(output):
        return Path(f"{str(output).rstrip('/').rsplit('/', maxsplit=1)[-1]}.skipped.jsonl")
    return Path(output).with_name(f"{Path(output).name}.skipped.jsonl")


class BadRecords:
    """Collects bad records while data is read; as a context it decides, at the end, whether they are too many.

    ``most`` is the greatest share of all records that may be skipped, 0 for none. Each goes to ``file`` as a line of
    JSON; the file is there only if there are any. Memory: a few lines per reason.
    """

    def __init__(self, file: Path, most: float = 0.0) -> None:
        self._file, self._most = file, most
        self._out: IO[str] | None = None
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}
        self.read = 0

    @property
    def count(self) -> int:
        """The bad records so far."""
        return self._counts.total()

    def add(self, where: str, reason: str, record: Any) -> None:
        """Take a bad record."""
        if self._out is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._out = self._file.open("w", encoding="utf-8")
        self._out.write(json.dumps({"where": where, "reason": reason, "record": record}, default=str) + "\n")
        self._counts[reason] += 1
        examples = self._first.setdefault(reason, [])
        if len(examples) < SHOWN:
            examples.append(f"{where} ({shown(record, 60)})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._out is not None:
            self._out.close()
        if error is None and self.count:
            if self.count > self._most * self.read:
                raise LogitcaskError(self._refusal())
            say(f"skipped {self.count:,} of {self.read:,} records: {self._reasons(1)}; all of them: {self._file}")

    def _refusal(self) -> str:
        remedy = "fix them, or pass --on-bad-record skip"
        if self._most:
            remedy = f"more than --max-bad {self._most:.3%}: fix them, or raise it"
        return (
            f"{self.count:,} bad records of {self.read:,}: {self._reasons(SHOWN)}; all of them: {self._file}; {remedy}"
        )

    def _reasons(self, examples: int) -> str:
        shown_reasons = [
            f"{count:,} x {reason}: {', '.join(self._first[reason][:examples])}"
            for reason, count in self._counts.most_common(REASONS_SHOWN)
        ]
        more = len(self._counts) - len(shown_reasons)
        return "; ".join(shown_reasons) + (f"; and {more} more reasons" if more > 0 else "")
