"""What tests need from a machine: without it they fail in CI, where ``.ci/run`` provides it, else skip."""

import os
from typing import NoReturn

import pytest

IN_CI = bool(os.environ.get("CI"))
as_root = pytest.mark.skipif(os.getuid() != 0 and not IN_CI, reason="only root can become a user without write access")


def lacking(what: str) -> NoReturn:
    """End a test because this machine lacks something: fail in CI, skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}: in CI nothing may be skipped")
    pytest.skip(what)
