"""How often a random test tries: less often in every check than in `just nightly`, by the same rules."""

import os


def times(check: int, nightly: int) -> int:
    """Return ``check``, or ``nightly`` in ``just nightly``."""
    return nightly if "LOGITCASK_NIGHTLY" in os.environ else check
