"""Caches on other machines: a Zarr store over fsspec that retries failed operations over a new connection.

Zarr's own FsspecStore neither reconnects nor writes atomically over SFTP.
"""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.disk_cache import DiskCache

T = TypeVar("T")
TRIES, FIRST_WAIT = 5, 0.5  # attempts per operation; seconds before the second attempt, doubled each time
AT_ONCE = 8  # objects written at the same time
LISTED_AT_ONCE = 32  # folders, over SFTP: each takes four round trips and almost no bandwidth
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
REFUSED = (
    *("PermissionError", "PermissionDenied", "HostKeyNotVerifiable", "NoCredentialsError", "NoSuchBucket"),
    *("OfflineModeIsEnabled", "HFValidationError"),
)
# scheme: module and class of the file system, pip extra, its arguments
_AWS = {
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}},
    "use_listings_cache": False,
}
_SSH = {"known_hosts": (), "connect_timeout": 15, "keepalive_interval": 15}  # (): ~/.ssh/known_hosts decides
SCHEMES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "s3": ("s3fs", "S3FileSystem", "s3", _AWS),
    "gs": (
        "gcsfs.core",
        "GCSFileSystem",
        "gs",
        {"use_listings_cache": False},
    ),  # the class that gcsfs exports tries gRPC first
    "hf": ("huggingface_hub", "HfFileSystem", "", {"use_listings_cache": False}),
    "ssh": ("sshfs", "SSHFileSystem", "ssh", _SSH),
    "sftp": ("sshfs", "SSHFileSystem", "ssh", _SSH),
}
SSH = ("ssh", "sftp")


def split_url(url: str) -> tuple[str, str, str]:
    """Return the scheme of a URL, its bucket, host or first folder, and the path below it, all as they are written.

    ``#``, ``?`` and ``%`` are characters like others, as in the stores' own tools; over SSH percent escapes stand for
    their characters. Raises LogitcaskError if the scheme is unknown, the host is missing, or stores and their tools
    would read the path in different ways.
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise LogitcaskError(f"{url}: {scheme}:// is not supported: give a folder, a .zip file or {known}")
    name, _, path = rest.partition("/")
    if not name:
        raise LogitcaskError(f"{url}: names no bucket, repository or host: give {scheme}://NAME/FOLDER")
    path = path.rstrip("/")
    problem = _url_problem(scheme.lower(), name.rpartition("@")[2], path)
    if problem:
        raise LogitcaskError(f"{ascii(url)[1:-1]}: {problem}")
    return scheme.lower(), name, path


def _url_problem(scheme: str, name: str, path: str) -> str | None:
    try:
        shown = unquote(path, errors="strict") if scheme in SSH else path
    except UnicodeDecodeError:
        return "its percent escapes must be UTF-8"
    folders = shown.split("/")
    if not f"{name}/{shown}".isprintable():
        return "holds a character that cannot be printed: remove it"
    if set("#?% ") & set(name):
        return f"the name of a bucket or host must not hold '#', '?', '%' or a space, got {name!r}"
    if "" in folders[:-1] or {".", ".."} & set(folders):
        return "must not have '//', '.' or '..' in its path: stores take them for different places"
    if scheme == "s3" and "?versionId=" in path:
        return "versions of objects cannot be read: remove '?versionId=' and what follows"
    return None


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, newly connected, and the path in it.

    Raises LogitcaskError if ``split_url`` does or a package is not installed.
    """
    scheme, name, path = split_url(url)
    module, maker, extra, options = SCHEMES[scheme]
    try:
        make = getattr(importlib.import_module(module), maker)
    except ImportError as error:
        package = f"logitcask[{extra}]" if extra else module
        raise LogitcaskError(f"{url}: needs {module}, which is not installed: pip install '{package}'") from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of exceptions it also raises
    root = f"{name}/{path}" if path else name
    if scheme in SSH:
        options = {**options, **_ssh_login(url, name)}
        root = f"/{unquote(path)}" if path else ""
    return make(**options, skip_instance_cache=True), root


def _ssh_login(url: str, name: str) -> dict[str, Any]:
    """Return the arguments in ``USER:PASSWORD@HOST:PORT``. Raises LogitcaskError if host or port is invalid."""
    login, _, place = name.rpartition("@")
    user, _, password = login.partition(":")
    try:
        parts = urlsplit(f"//{place}")
        given = {"host": parts.hostname, "port": parts.port, "username": unquote(user), "password": unquote(password)}
    except ValueError as error:
        raise LogitcaskError(f"{url}: must be ssh://USER@HOST:PORT/FOLDER: {error}") from error
    if not given["host"]:
        raise LogitcaskError(f"{url}: names no host: give ssh://HOST/FOLDER")
    return {key: value for key, value in given.items() if value}


class RemoteStore(Store):
    """The objects below a URL. A failed operation is retried over a new connection, a few times."""

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, url: str, *, read_only: bool, disk_cache: DiskCache | None = None, tries: int = 0) -> None:
        """Prepare a store, which connects at the first operation.

        ``disk_cache`` holds objects that were checked against their digests. ``tries`` is the number of attempts per
        operation, 0 for the default. Raises LogitcaskError if ``split_url`` does, or if ``disk_cache`` is foreign.
        """
        super().__init__(read_only=read_only)
        split_url(url)
        if disk_cache and disk_cache.is_foreign():
            raise LogitcaskError(
                f"{disk_cache.folder}: must be a folder that logitcask made: rename it or choose another --local-copies"
            )
        self.url, self.disk_cache, self._tries = url.rstrip("/"), disk_cache, tries or TRIES
        self._connected: tuple[Any, str] | None = None
        self._connecting = asyncio.Lock()

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and self.url == other.url

    __hash__ = None  # type: ignore[assignment]

    async def _try(self, operation: Callable[[Any, str], T]) -> T:
        """Return the result of ``operation(file system, root)``. Raises LogitcaskError if it keeps failing."""
        for attempt in range(self._tries):
            connected = None
            try:
                async with self._connecting:
                    if self._connected is None:
                        self._connected = await asyncio.to_thread(filesystem, self.url)
                    connected = self._connected
                return await asyncio.to_thread(operation, *connected)
            except (*GONE, LogitcaskError):
                raise
            except Exception as error:  # each library raises its own for a dropped connection
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                if _is_refusal(error):
                    raise LogitcaskError(
                        f"{self.url}: refused: {reason}: check the address and the access rights"
                    ) from error
                if attempt + 1 == self._tries:
                    raise LogitcaskError(
                        f"{self.url}: no connection after {self._tries} tries: {reason}: run the same command again to "
                        "resume"
                    ) from error
            if self._connected is connected:
                self._connected = None
            await asyncio.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError("unreachable")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of an object, None if there is none; a range must have both ends."""
        assert byte_range is None or isinstance(byte_range, RangeByteRequest)

        def read(fs: Any, root: str) -> bytes:
            path = f"{root}/{key}"
            if byte_range is None:
                return bytes(fs.cat_file(path))
            if _is_ssh(fs):  # sshfs reads whole files only
                if fs.info(path)["size"] > byte_range.end:
                    return bytes(byte_range.end - byte_range.start)
                return bytes(fs.cat_file(path))[byte_range.start : byte_range.end]
            try:
                return bytes(fs.cat_file(path, start=byte_range.start, end=byte_range.end))
            except Exception as error:
                if "satisfiable" in str(error):  # an empty object
                    return b""
                raise

        try:
            return prototype.buffer.from_bytes(await self._try(read))
        except GONE:
            return None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return the bytes of several objects."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object atomically."""
        self._check_writable()

        def write(fs: Any, root: str) -> None:
            path = f"{root}/{key}"
            if not _is_ssh(fs):
                fs.pipe_file(path, value.to_bytes())  # object stores show an object only when it is complete
                return
            partial = f"{path}.partial"
            fs.pipe_file(partial, value.to_bytes())
            fs.mv(partial, path)

        try:
            await self._try(write)
        except GONE as error:
            raise LogitcaskError(f"{self.url}: cannot be written: {error}: make the bucket or folder first") from error

    def set_all(self, objects: Mapping[str, bytes]) -> None:
        """Write several objects concurrently."""
        make = default_buffer_prototype().buffer.from_bytes

        async def write() -> None:
            slots = asyncio.Semaphore(AT_ONCE)

            async def one(key: str, data: bytes) -> None:
                async with slots:
                    await self.set(key, make(data))

            await asyncio.gather(*(one(key, data) for key, data in objects.items()))

        sync(write())

    def attempt(self, operation: Callable[[Any, str], T]) -> T:
        """Return the result of ``operation(file system, root)``, tried as often as every other operation.

        Raises LogitcaskError if it keeps failing, FileNotFoundError if it does.
        """
        return sync(self._try(operation))

    async def delete(self, key: str) -> None:
        """Remove an object; do nothing if it is missing."""
        self._check_writable()
        try:
            await self._try(lambda fs, root: fs.rm_file(f"{root}/{key}"))
        except GONE:
            return

    async def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        return bool(await self._try(lambda fs, root: fs.exists(f"{root}/{key}")))

    async def list(self) -> AsyncIterator[str]:
        """Yield every key."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield every key in a folder."""
        for name in await self.sizes(prefix):
            yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below a folder."""

        def names(fs: Any, root: str) -> list[str]:
            folder = f"{root}/{prefix}".rstrip("/")
            entries = [(str(entry["name"]).rstrip("/"), entry.get("size")) for entry in fs.ls(folder, detail=True)]
            # consoles mark a folder that they create by an empty object with its name
            return [name.rsplit("/", 1)[-1] for name, size in entries if name != folder or size]

        try:
            listed = await self._try(names)
        except GONE:
            return
        for name in listed:
            yield name

    async def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size of every object in a folder in bytes, by key, from one listing."""

        def find(fs: Any, root: str) -> dict[str, int]:
            folder = f"{root}/{prefix}".rstrip("/")
            entries = _find_by_level(fs, folder) if _is_ssh(fs) else fs.find(folder, detail=True)
            sizes = {str(name).removeprefix(f"{root}/"): int(info["size"] or 0) for name, info in entries.items()}
            return {key: size for key, size in sizes.items() if key and not key.endswith("/")}  # less marks of folders

        try:
            return await self._try(find)
        except GONE:
            return {}


def _is_ssh(fs: Any) -> bool:
    return type(fs).__module__.startswith("sshfs")


def _find_by_level(fs: Any, folder: str) -> dict[str, Any]:
    """Return what ``fs.find`` does, listing all folders of a level at once: there is one per shard and array."""
    files: dict[str, Any] = {}
    folders = [folder]
    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        while folders:
            entries = [entry for listing in pool.map(lambda each: _listing(fs, each), folders) for entry in listing]
            files |= {entry["name"]: entry for entry in entries if entry["type"] != "directory"}
            folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
    return files


def _listing(fs: Any, folder: str) -> list[dict[str, Any]]:
    try:
        return list(fs.ls(folder, detail=True))
    except GONE:
        return []


def _is_refusal(error: Exception) -> bool:
    """Return whether retrying is useless; Google's and the hub's 401 and 403 have no exception classes of their own."""
    known = (
        type(error).__name__ in REFUSED or str(error).startswith("Forbidden:") or getattr(error, "code", None) == 401
    )
    return known or getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
