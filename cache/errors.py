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


def differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Every key whose values differ, as ``name: cache has X, this run has Y``."""
    keys = sorted(found.keys() | wanted.keys())
    return [
        f"{key}: cache has {found.get(key)!r}, this run has {wanted.get(key)!r}"
        for key in keys
        if found.get(key) != wanted.get(key)
    ]
