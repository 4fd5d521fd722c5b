"""A folder as one .zip file, whose entries are stored as they are."""

import os
import shutil
import zipfile
from pathlib import Path

from logitcask.cache.storage.open import flush_names_above

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # of every entry, so that equal caches give equal files


def pack(folder: Path, destination: Path) -> None:
    """Move a cache from a folder into a .zip file, which appears only when it is complete; remove the folder."""
    partial = destination.with_name(f".{destination.name}.partial")
    with partial.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"):
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), ZIP_DATE)
                entry.external_attr = 0o644 << 16
                entry.file_size = path.stat().st_size
                with path.open("rb") as source, archive.open(entry, "w") as target:
                    shutil.copyfileobj(source, target)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(destination)
    flush_names_above(destination)  # before what it was made from is gone
    shutil.rmtree(folder)
