"""Records as they lie in files, folders and hub data sets, in a defined order, one in memory at a time."""

import csv
import glob
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.pipeline.text.columns import RecordError

LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst", ".bz2")
FILES = (*LINES, ".json", ".csv", ".parquet")
JSON_CHUNK = 1 << 20  # characters of a .json file read at a time
CSV_FIELD = 1 << 30  # characters of a field at most
ROWS_AT_ONCE = 1000  # of a data set
NOT_UTF8 = "is not valid UTF-8"
_BETWEEN = re.compile(r"[\s,]*")  # what may stand between the records of a .json file
Raw = tuple[str, dict[str, Any] | RecordError]  # where a record stands, and the record, or why there is none


def read_records(sources: Sequence[str], *, config: str | None = None, split: str = "train") -> Iterator[Raw]:
    """Yield where each record stands, and the record, of all sources in order.

    A source is a file (.jsonl, .json, .csv, .parquet; .gz, .zst and .bz2 of the text formats), a glob pattern, a folder
    of such files or of ``datasets``' ``save_to_disk``, or a hub data set's id, of which ``config`` and ``split`` are
    taken. What is no record gives a RecordError in its place. Raises LogitcaskError if a source is missing, empty or
    damaged, or changes while it is read.
    """
    for source in sources:
        empty = True
        for where, record in _source_records(source, config, split):
            empty = False
            yield where, record
        if empty:
            raise LogitcaskError(f"{source}: has no examples: it must hold at least one record")


def is_saved(source: str) -> bool:
    """Return whether a source is a folder that ``datasets``' ``save_to_disk`` wrote."""
    return any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def source_files(source: str) -> list[Path] | None:
    """Return a source's files in the order they are read, None if it is a hub data set.

    Raises LogitcaskError if a path or pattern has none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and _format(file) and not _is_hidden(file, path)
        )
        if not files:
            raise LogitcaskError(f"{source}: a folder without data files: give files ending in {', '.join(FILES)}")
        return files
    if path.exists():
        raise LogitcaskError(f"{source}: a pipe or a device, which can be read once only: write it to a file first")
    if any(sign in source for sign in "*?["):
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not files:
            raise LogitcaskError(f"{source}: the pattern matches no file")
        return files
    if _format(path) or path.suffix in COMPRESSED or path.is_absolute() or source.startswith("."):
        raise LogitcaskError(f"{source}: no such data file: give a file, a folder, a pattern or a data set's hub id")
    return None


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _format(file: Path) -> str:
    """Return the ending that says what a file holds, without that of its compression; "" if it is no data file."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return name.suffix.lower() if name.suffix.lower() in FILES else ""


def _source_records(source: str, config: str | None, split: str) -> Iterator[Raw]:
    if is_saved(source):
        yield from _saved_dataset(source, split)
        return
    files = source_files(source)
    if files is None:
        yield from _hub_records(source, config, split)
        return
    for file in files:
        try:
            before = _state(file)
            yield from _file_records(file)
            if _state(file) != before:
                raise LogitcaskError(f"{file}: changed while it was read: run the same command again")
        except OSError as error:
            raise LogitcaskError(f"{file}: cannot be read: {first_line(error)}") from error


def _state(file: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to or replaced."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _file_records(file: Path) -> Iterator[Raw]:
    kind = _format(file)
    if kind == ".parquet":
        yield from _parquet_records(str(file))
    elif kind == ".json":
        yield from _json_records(file)
    elif kind == ".csv":
        yield from _csv_records(file)
    else:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", _parse_line(line)


def _open(file: Path) -> IO[bytes]:
    """Open a file for reading, uncompressed."""
    import pyarrow

    if file.suffix.lower() in COMPRESSED:
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="detect"))
    return file.open("rb")


def _parse_line(line: bytes) -> dict[str, Any] | RecordError:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return RecordError(NOT_UTF8, line.decode(errors="backslashreplace"))
    except (ValueError, RecursionError) as error:
        reason = f"malformed JSON: {first_line(error).split(':')[0]}"
        return RecordError(reason, line.decode(errors="backslashreplace"))
    return _object(record)


def _object(record: Any) -> dict[str, Any] | RecordError:
    if isinstance(record, dict):
        return record
    return RecordError(f"must be a JSON object, got {type(record).__name__}", record)


def _is_utf8(text: str) -> bool:
    """Return whether a text has no byte that ``surrogateescape`` had to keep."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _json_records(file: Path) -> Iterator[Raw]:
    """Yield the objects of a JSON array, or of lines, a piece of the file at a time."""
    decoder, number = json.JSONDecoder(), 0
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", errors="surrogateescape") as text:
        buffer = text.read(JSON_CHUNK).lstrip()
        array = buffer.startswith("[")
        at = int(array)
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # it matches nothing too
            if array and buffer.startswith("]", at):
                return
            try:
                record, end = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                more = text.read(max(JSON_CHUNK, len(buffer) - at))
                if not more and at == len(buffer) and not array:
                    return
                if not more:
                    raise LogitcaskError(
                        f"{file}: malformed JSON after record {number}: {first_line(error).split(':')[0]}"
                    ) from error
                buffer, at = buffer[at:] + more, 0
                continue
            number += 1
            raw = buffer[at:end]
            yield f"{file}: record {number}", _object(record) if _is_utf8(raw) else RecordError(NOT_UTF8, _escaped(raw))
            at = end


def _escaped(text: str) -> str:
    """Return a text with the bytes that ``surrogateescape`` kept written as ``\\xff``."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _csv_records(file: Path) -> Iterator[Raw]:
    csv.field_size_limit(CSV_FIELD)
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, strict=True)
        number = 0
        try:
            names = next(rows, [])
            if not all(map(_is_utf8, names)):
                raise LogitcaskError(f"{file}: not a CSV file in UTF-8: its first line must be column names")
            while (row := next(rows, None)) is not None:
                if row:
                    number += 1
                    yield f"{file}: row {number}", _csv_record(names, row)
        except csv.Error as error:
            raise LogitcaskError(f"{file}: not a CSV file, after row {number}: {error}") from error


def _csv_record(names: list[str], row: list[str]) -> dict[str, Any] | RecordError:
    if len(row) > len(names):
        return RecordError(f"has more fields than the {len(names)} columns", [_escaped(field) for field in row])
    record = {name: value for name, value in zip(names, row, strict=False) if value != ""}
    if not all(map(_is_utf8, record.values())):
        return RecordError(NOT_UTF8, {name: _escaped(value) for name, value in record.items()})
    return record


def _parquet_records(source: str) -> Iterator[Raw]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches():
                for record in _rows(batch):
                    number += 1
                    yield f"{source}: row {number}", record
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # untrusted files fail in any of these
        raise LogitcaskError(
            f"{source}: damaged or not a Parquet file, after row {number}: {first_line(error)}"
        ) from error


def _rows(table: Any) -> Iterator[dict[str, Any] | RecordError]:
    """Yield the rows of an Arrow table or batch; one by one if a text in them is not valid UTF-8."""
    try:
        yield from map(_unfilled, table.to_pylist())
    except UnicodeDecodeError:
        for number in range(table.num_rows):
            row = table.slice(number, 1)
            try:
                yield from map(_unfilled, row.to_pylist())
            except UnicodeDecodeError:
                yield RecordError(NOT_UTF8, {name: _cell(row.column(name)) for name in row.schema.names})


def _unfilled(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the nulls by which Arrow gives every call's arguments the keys that any call's have."""
    return {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(item) for item in value]
    return value


def _cell(column: Any) -> Any:
    """Return the value of a column of one row, its text with invalid bytes escaped."""
    import pyarrow

    try:
        return column.to_pylist()[0]
    except UnicodeDecodeError:
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            return f"a {column.type} with invalid UTF-8"
        return column.cast(pyarrow.large_binary()).to_pylist()[0].decode(errors="backslashreplace")


def _saved_dataset(source: str, split: str) -> Iterator[Raw]:
    import datasets

    try:
        saved: Any = datasets.load_from_disk(source)
    except (OSError, ValueError) as error:
        raise LogitcaskError(f"{source}: not a data set saved by datasets: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise LogitcaskError(f"{source}: has no split {split!r}: give --data-split, one of {', '.join(saved)}")
        saved = saved[split]
    yield from _dataset_rows(source, saved)


def _hub_records(source: str, config: str | None, split: str) -> Iterator[Raw]:
    import datasets

    try:
        splits: Any = datasets.load_dataset(source, config, streaming=True)
    except (OSError, ValueError) as error:
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            names = ", ".join(datasets.get_dataset_config_names(source))
            has = "has several configurations" if config is None else f"has no configuration {config!r}"
            raise LogitcaskError(f"{source}: {has}: give --data-config, one of {names}") from error
        raise LogitcaskError(
            f"{source}: neither a file nor a data set that could be loaded: {first_line(error)}"
        ) from error
    if split not in splits:
        raise LogitcaskError(f"{source}: has no split {split!r}: give --data-split, one of {', '.join(splits)}")
    yield from _dataset_rows(source, splits[split])


def _dataset_rows(source: str, rows: Any) -> Iterator[Raw]:
    """Yield the records of a data set of ``datasets``, as Arrow has them: not decoded as images or sound."""
    number = 0
    try:
        for table in rows.with_format("arrow").iter(ROWS_AT_ONCE):
            for record in _rows(table):
                number += 1
                yield f"{source}: row {number}", record
    except (OSError, ValueError) as error:
        raise LogitcaskError(f"{source}: damaged after row {number}: {first_line(error)}") from error
