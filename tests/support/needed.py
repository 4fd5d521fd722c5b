"""What tests need from a machine: without it they fail in CI, where ``.ci/run`` provides it, else skip."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest

IN_CI = bool(os.environ.get("CI"))
as_root = pytest.mark.skipif(os.getuid() != 0 and not IN_CI, reason="only root can become a user without write access")


def with_bitsandbytes() -> dict[str, str]:
    """Return the environment of a process that has bitsandbytes, in a folder of its own: others need not import it."""
    folder = Path(sys.prefix) / "bitsandbytes"
    if not folder.exists():
        lacking("bitsandbytes is missing: just setup")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def lacking(what: str) -> NoReturn:
    """End a test because this machine lacks something: fail in CI, skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}: in CI nothing may be skipped")
    pytest.skip(what)
