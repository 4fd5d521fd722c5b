"""Records as they lie in files, folders and hub data sets, in a defined order, one in memory at a time."""

import csv
import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.pipeline.text.columns import RecordError

LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst", ".bz2")
FILES = (*LINES, ".json", ".csv", ".parquet")
JSON_CHUNK = 1 << 20  # characters of a .json file read at a time
Raw = tuple[str, dict[str, Any] | RecordError]  # where a record stands, and the record, or why there is none


def read_records(sources: Sequence[str], *, config: str | None = None, split: str = "train") -> Iterator[Raw]:
    """Yield where each record stands, and the record, of all sources in order.

    A source is a file (.jsonl, .json, .csv, .parquet; .gz, .zst and .bz2 of the text formats), a glob pattern, a folder
    of such files or of ``datasets``' ``save_to_disk``, or a hub data set's id, of which ``config`` and ``split`` are
    taken. A line that is no JSON object gives a RecordError in place of a record. Raises LogitcaskError if a source is
    missing, empty or damaged.
    """
    for source in sources:
        empty = True
        for where, record in _source_records(source, config, split):
            empty = False
            yield where, record
        if empty:
            raise LogitcaskError(f"{source}: has no examples: it must hold at least one record")


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
    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        yield from _saved_dataset(source, split)
        return
    files = source_files(source)
    if files is None:
        yield from _hub_records(source, config, split)
        return
    for file in files:
        try:
            yield from _file_records(file)
        except OSError as error:
            raise LogitcaskError(f"{file}: cannot be read: {first_line(error)}") from error


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


def _parse_line(text: bytes) -> dict[str, Any] | RecordError:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RecordError(f"malformed JSON: {first_line(error).split(':')[0]}")
    return _object(record)


def _object(record: Any) -> dict[str, Any] | RecordError:
    return record if isinstance(record, dict) else RecordError(f"must be a JSON object, got {type(record).__name__}")


def _json_records(file: Path) -> Iterator[Raw]:
    """Yield the objects of a JSON array, or of lines, a piece of the file at a time."""
    decoder, number = json.JSONDecoder(), 0
    with io.TextIOWrapper(_open(file), encoding="utf-8", errors="surrogateescape") as text:
        buffer = text.read(JSON_CHUNK).lstrip()
        array = buffer.startswith("[")
        buffer = buffer.removeprefix("[")
        while True:
            buffer = buffer.lstrip().removeprefix(",").lstrip()
            if array and buffer.startswith("]"):
                return
            try:
                record, end = decoder.raw_decode(buffer)
            except (ValueError, RecursionError) as error:
                more = text.read(JSON_CHUNK)
                if not more and not buffer and not array:
                    return
                if not more:
                    raise LogitcaskError(f"{file}: malformed JSON after record {number}: {error}") from error
                buffer += more
                continue
            number += 1
            yield f"{file}: record {number}", _object(record)
            buffer = buffer[end:]


def _csv_records(file: Path) -> Iterator[Raw]:
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as text:
        try:
            for number, row in enumerate(csv.DictReader(text, strict=True), start=1):
                yield f"{file}: row {number}", {str(key): value for key, value in row.items() if value != ""}
        except (csv.Error, UnicodeDecodeError) as error:
            raise LogitcaskError(f"{file}: not a CSV file in UTF-8 with a line of column names: {error}") from error


def _parquet_records(source: str) -> Iterator[Raw]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{source}: row {number}", record
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # untrusted files fail in any of these
        raise LogitcaskError(
            f"{source}: damaged or not a Parquet file, after row {number}: {first_line(error)}"
        ) from error


def _saved_dataset(source: str, split: str) -> Iterator[Raw]:
    import datasets

    try:
        saved: Any = datasets.load_from_disk(source)
        rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        for number, record in enumerate(rows, start=1):
            yield f"{source}: row {number}", dict(record)
    except KeyError as error:
        raise LogitcaskError(f"{source}: has no split {split!r}: give --data-split") from error
    except (OSError, ValueError) as error:
        raise LogitcaskError(f"{source}: not a data set saved by datasets: {first_line(error)}") from error


def _hub_records(source: str, config: str | None, split: str) -> Iterator[Raw]:
    import datasets

    try:
        rows = datasets.load_dataset(source, config, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{source}: row {number}", dict(record)
    except (OSError, ValueError) as error:
        raise LogitcaskError(
            f"{source}: neither a file nor a data set that could be loaded: {first_line(error)}"
        ) from error
