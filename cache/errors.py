"""Errors a user can fix. The command line prints them as one line and exits with 2; any other exception is a bug."""

from collections.abc import Mapping


class LogitcaskError(Exception):
    """A mistake of the user's: the message gives the rule, the value and the remedy."""


class CacheFormatError(LogitcaskError):
    """The folder is not a cache, or not one that this version can read."""


class CacheMismatchError(LogitcaskError):
    """The cache is sound but does not fit the run."""


class IncompleteCacheError(LogitcaskError):
    """Some shards of the cache are not committed."""


def differences(stored: Mapping[str, object], wanted: Mapping[str, object], holder: str = "cache") -> list[str]:
    """Return one line ``name: HOLDER has X, this run has Y`` for each key whose values differ, sorted by key."""
    keys = sorted(stored.keys() | wanted.keys())
    return [
        f"{key}: {holder} has {shown(stored.get(key))}, this run has {shown(wanted.get(key))}"
        for key in keys
        if stored.get(key) != wanted.get(key)
    ]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def shown_reason(error: BaseException, limit: int = 300) -> str:
    """Return why a library refused somebody's files, as one line: the class of its error and its message, cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def shown(value: object, limit: int = 80) -> str:
    """Return untrusted input as one line of ASCII, control characters escaped, of at most ``limit`` characters."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
