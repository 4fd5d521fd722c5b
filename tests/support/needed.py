"""What tests need of a machine: in CI, where ``.ci/run`` sees to it, its absence is a failure, elsewhere a skip."""

import os
from typing import NoReturn

import pytest

IN_CI = bool(os.environ.get("CI"))
as_root = pytest.mark.skipif(os.getuid() != 0 and not IN_CI, reason="only root can become somebody who may not write")


def lacking(what: str) -> NoReturn:
    """End a test for what this machine lacks."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}: in CI nothing is skipped")
    pytest.skip(what)
