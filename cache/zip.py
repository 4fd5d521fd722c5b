"""A cache in one file: its objects, stored as they are, in order, with a fixed time, so that equal caches are equal."""

import os
import shutil
import zipfile
from pathlib import Path

TIME = (1980, 1, 1, 0, 0, 0)


def pack(folder: Path, destination: Path) -> None:
    """Move a cache from a folder into a .zip file, which appears at once and whole; the folder is removed."""
    partial = destination.with_name(f".{destination.name}.partial")
    with partial.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"):
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), TIME)
                entry.external_attr = 0o644 << 16
                entry.file_size = path.stat().st_size
                with path.open("rb") as source, archive.open(entry, "w") as target:
                    shutil.copyfileobj(source, target)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(destination)
    shutil.rmtree(folder)
