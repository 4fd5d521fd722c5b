"""How often a random test tries: less often in every check than in `just nightly`, by the same rules."""

import os


def nightly() -> bool:
    """Return whether this is ``just nightly``."""
    return "LOGITCASK_NIGHTLY" in os.environ


def times(check: int, at_night: int) -> int:
    """Return how often to try: ``check`` times in every check."""
    return at_night if nightly() else check
