"""Errors a user can mend. The command line prints them as one line and exits with 2; anything else is a bug."""

from collections.abc import Mapping


class LogitcaskError(Exception):
    """The user's mistake: the message gives the rule, the value and the remedy."""


class CacheFormatError(LogitcaskError):
    """The folder is no cache, or not one this version can read."""


class CacheMismatchError(LogitcaskError):
    """The cache is sound but does not fit the run."""


class IncompleteCacheError(LogitcaskError):
    """Some shards of the cache are not committed."""


def differences(found: Mapping[str, object], wanted: Mapping[str, object], there: str = "cache") -> list[str]:
    """Every key whose values differ, as ``name: cache has X, this run has Y``; ``there`` names what was found."""
    keys = sorted(found.keys() | wanted.keys())
    return [
        f"{key}: {there} has {shown(found.get(key))}, this run has {shown(wanted.get(key))}"
        for key in keys
        if found.get(key) != wanted.get(key)
    ]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def shown(value: object, limit: int = 80) -> str:
    """A value from outside on one line, control characters escaped, cut where it is long."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
