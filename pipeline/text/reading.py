"""Which records of the data are taken, and which files or data sets they came from: what changed since is named."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.records import Raw, is_saved, read_records, source_files

VALUES_SHOWN = 5
Files = dict[str, list[object]]  # bytes and SHA-256 by path, records and SHA-256 by hub data set, in the order read


@dataclass(frozen=True)
class Reading:
    """What is taken of ``sources``: of hub data sets a configuration, a split of these and of saved data sets, and
    where columns have given values."""  # fmt: skip

    sources: tuple[str, ...]
    config: str | None = None
    split: str = "train"
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)  # allowed values by column
    renamed: Mapping[str, str] = field(default_factory=dict)  # our names of the user's columns
    from_hub: Files = field(default_factory=dict, init=False)  # the data sets of the hub that were read to their end

    def __post_init__(self) -> None:
        on_hub = any(map(_is_on_hub, self.sources))
        if self.config is not None and not on_hub:
            raise LogitcaskError(f"--data-config {self.config}: applies to data sets of the hub, and none is given")
        if self.split != "train" and not on_hub and not any(map(is_saved, self.sources)):
            raise LogitcaskError(
                f"--data-split {self.split}: applies to data sets of the hub or saved by datasets, and none is given"
            )

    def __call__(self, source: str) -> Iterator[Raw]:
        """Yield the records of a source; what is no record is always among them.

        Raises LogitcaskError as ``read_records`` does, and if ``where`` leaves no record of the source.
        """
        records = read_records([source], config=self.config, split=self.split)
        if _is_on_hub(source):
            records = self._noted(source, records)
        if not self.where:
            yield from records
            return
        chosen, others = False, dict[str, None]()
        for where, record in records:
            named = (
                {self.renamed.get(name, name): value for name, value in record.items()}
                if isinstance(record, dict)
                else None
            )
            if named is None or all(str(named.get(column)) in allowed for column, allowed in self.where.items()):
                chosen = True
                yield where, record
            elif len(others) < VALUES_SHOWN:
                others[shown({column: named.get(column) for column in self.where})] = None
        if not chosen:
            wanted = ",".join(f"{column}={value}" for column, values in self.where.items() for value in values)
            raise LogitcaskError(f"{source}: no record has --where {wanted}; there are {', '.join(others)}")

    def _noted(self, source: str, records: Iterator[Raw]) -> Iterator[Raw]:
        """Yield the records of a data set of the hub; at the end, note their number and digest."""
        number, digest = 0, hashlib.sha256()
        for where, record in records:
            number += 1
            content = [str(record), record.value] if isinstance(record, RecordError) else record
            digest.update(json.dumps(content, default=str).encode() + b"\n")
            yield where, record
        self.from_hub[source] = [number, digest.hexdigest()]


def _is_on_hub(source: str) -> bool:
    return not is_saved(source) and source_files(source) is None


def data_files(reading: Reading) -> Files:
    """Return the files that records are read from, and the data sets of the hub that were read, with their digests."""
    files: Files = {}
    for source in reading.sources:
        if source in reading.from_hub:
            files[source] = reading.from_hub[source]
            continue
        paths = sorted(Path(source).rglob("*.arrow")) if is_saved(source) else source_files(source) or []
        for path in paths:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[str(path)] = [path.stat().st_size, digest]
    return files


def _files_record(output: Path | str) -> Path | None:
    """Return where the files of a run's data are recorded, beside its output; None at a URL."""
    return None if "://" in str(output) else Path(output).with_name(f"{Path(output).name}.files.json")


def record_files(output: Path | str, reading: Reading) -> None:
    """Write down the files of a run's data, if its output is a folder that is no volume and has a place beside it.

    It only serves a message, so a failure is none of the run.
    """
    record = _files_record(output)
    if record is None or os.path.ismount(output):
        return
    partial = record.with_name(f".{record.name}.{os.getpid()}.partial")
    text = json.dumps(data_files(reading), indent=1) + "\n"
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(record)


def changed_files(output: Path | str, reading: Reading) -> str:
    """Return, for a message, what of the data changed since it was written down, "" if that is not known."""
    record = _files_record(output)
    try:
        before = None if record is None else json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(before, dict):
        return ""
    now = data_files(reading)
    changes = [
        *(f"{name} changed" for name in now if name in before and before[name] != now[name]),
        *(f"{name} is new" for name in now if name not in before),
        *(f"{shown(name)[1:-1]} is gone" for name in before if name not in now),
    ]
    if not changes:
        if list(before) != list(now):
            return "; the files are the same, in another order"
        return "; the data did not change since: an option did" if now else ""
    more = f" and {len(changes) - VALUES_SHOWN} more" if len(changes) > VALUES_SHOWN else ""
    return f"; since the first run {', '.join(changes[:VALUES_SHOWN])}{more}"
