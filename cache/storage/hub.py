"""A folder of a repository on the Hugging Face hub, written in few commits, as the hub allows few per hour.

Large objects are uploaded as they come and appear with their commit; until then only their names and small ones are
held. The hub names the SHA-256 of what it holds, so that a copy is checked without downloading it.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard, TypeVar

from zarr.abc.store import Store

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.bounded import MAX_JSON, read_bounded
from logitcask.cache.storage.remote import RemoteStore, split_url

T = TypeVar("T")
PATHS = 500  # objects asked for at a time
KINDS = {"datasets": "dataset", "spaces": "space"}  # first folder of a URL; a model has none


class HubFolder:
    """A folder into which objects are staged, then committed together."""

    def __init__(self, store: RemoteStore) -> None:
        """Take a store at an hf:// URL. Raises LogitcaskError if its repository cannot be seen, or without a token."""
        self._store = store
        self._staged: list[Any] = []
        self._ask(lambda fs, place: None)
        if _token() is None:
            raise explained(store.url, None)

    def present(self, proofs: Mapping[str, bytes]) -> set[str]:
        """Return the keys of those objects that are there with the given SHA-256."""
        keys = list(proofs)

        def ask(fs: Any, place: Any) -> dict[str, str | None]:
            below, there = _below(place), {}
            for start in range(0, len(keys), PATHS):
                paths = [f"{below}{key}" for key in keys[start : start + PATHS]]
                for info in fs._api.get_paths_info(paths=paths, **_repository(place)):
                    if hasattr(info, "blob_id"):  # a file
                        there[info.path.removeprefix(below)] = info.lfs.sha256 if info.lfs else None
            return there

        stored = self._ask(ask)
        small = {key: read_bounded(self._store, key, MAX_JSON) or b"" for key, sha in stored.items() if sha is None}
        have = {**stored, **{key: hashlib.sha256(data).hexdigest() for key, data in small.items()}}
        return {key for key, sha in have.items() if sha == proofs[key].hex()}

    def stage(self, objects: Mapping[str, bytes]) -> None:
        """Upload objects, which appear with the next commit. What an interrupted run uploaded is not sent again."""
        from huggingface_hub import CommitOperationAdd

        def upload(fs: Any, place: Any) -> list[Any]:
            added = [CommitOperationAdd(f"{_below(place)}{key}", data) for key, data in objects.items()]
            with _without_bars():
                fs._api.preupload_lfs_files(additions=added, **_repository(place))
            return added

        if objects:
            self._staged += self._ask(upload)

    def commit(self, message: str) -> None:
        """Make what was staged appear, in one commit; do nothing if nothing was."""

        def send(fs: Any, place: Any) -> None:
            with _without_bars():
                fs._api.create_commit(operations=self._staged, commit_message=message, **_repository(place))
            fs.invalidate_cache()  # of listings

        if self._staged:
            self._ask(send)
            self._staged = []

    def _ask(self, operation: Callable[[Any, Any], T]) -> T:
        """Return ``operation(file system, resolved folder)``. Raises LogitcaskError with the remedy if refused."""
        try:
            return self._store.attempt(lambda fs, root: operation(fs, fs.resolve_path(root)))
        except FileNotFoundError as error:
            raise explained(self._store.url, error) from error
        except LogitcaskError as error:
            if _status(error.__cause__) in (401, 403, 404):
                raise explained(self._store.url, error.__cause__) from error
            raise


def is_repository(store: Store) -> TypeGuard[RemoteStore]:
    """Return whether a store is (in) a repository on the hub, in which objects appear by commits."""
    return isinstance(store, RemoteStore) and store.url.startswith("hf:") and not store.url.startswith("hf://buckets/")


def _repository(place: Any) -> dict[str, str]:
    return {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}


def _below(place: Any) -> str:
    return f"{place.path_in_repo}/" if place.path_in_repo else ""


def _status(error: BaseException | None) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def explained(url: str, error: BaseException | None) -> LogitcaskError:
    """Return why the hub refuses, in one line: the token, the repository, its kind, its branch."""
    _, first, path = split_url(url)
    kind = KINDS.get(first, "model")
    parts = [*([] if first in KINDS else [first]), *path.split("/")]
    name, _, branch = "/".join(parts[:2]).partition("@")
    if _token() is None:
        return LogitcaskError(f"{url}: the hub needs a token: run hf auth login, or set HF_TOKEN")
    if _status(error) == 403:
        return LogitcaskError(f"{url}: the token may not write to {name}: use one with write access")
    if _status(error) == 401:
        return LogitcaskError(f"{url}: the hub refuses the token: run hf auth login, or set HF_TOKEN")
    if "revision not found" in str(error):
        return LogitcaskError(f"{url}: {name} has no branch {branch}: make it, or leave out @{branch}")
    other = _other_kind(name, kind)
    if other:
        return LogitcaskError(f"{url}: {name} is no {kind} but a {other[1]}: write hf://{other[0]}{name}")
    make = f"hf repos create {name}" + ("" if kind == "model" else f" --type {kind}")
    return LogitcaskError(f"{url}: no such repository, or not for this token: make it with {make}")


def _other_kind(name: str, kind: str) -> tuple[str, str] | None:
    """Return the beginning of the URL and the kind of a repository of that name but of another kind."""
    from huggingface_hub import HfApi

    for first, other in (("", "model"), *((f"{folder}/", each) for folder, each in KINDS.items())):
        with contextlib.suppress(Exception):  # it only helps a message
            if other != kind and HfApi().repo_info(name, repo_type=other):
                return first, other
    return None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library's own progress bars away."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
