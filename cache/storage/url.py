"""Whether a cache is in a folder or at a URL."""

import re
from pathlib import Path

from logitcask.cache.errors import LogitcaskError

ONE_SLASH = re.compile(r"((?:s3|gs|gcs|hf|ssh|sftp|https?|abfs|az|webdav|memory):)/(?!/)")


def is_url(path: str | Path) -> bool:
    """Return whether a cache's path is a URL, on another machine. Raises LogitcaskError if it lacks a slash."""
    if lacking := ONE_SLASH.match(str(path)):
        raise LogitcaskError(
            f"{path}: a URL has two slashes after its scheme: write {lacking[1]}//{str(path)[lacking.end() :]}, as "
            "text, for a Path drops one"
        )
    return isinstance(path, str) and "://" in path
