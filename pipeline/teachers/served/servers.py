"""HTTP requests to several servers at once: each goes to the least busy one, and to another if that one fails.

A server that fails is left alone for 0.5 s, then for twice as long each time, at most 30 s, or for as long as its
Retry-After header says; then a single request tries it. The key comes from the environment and is removed from every
message.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from logitcask.cache.errors import LogitcaskError, first_line, shown

KEY_VARIABLE = "OPENAI_COMPATIBLE_API_KEY"
TRANSIENT_STATUS = {408, 409, 425, 429}  # and 5xx
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 0.5, 30.0, 600.0  # seconds
MAX_BROKEN = 4  # times that a server may answer one request with 500: it does so if a log-probability is NaN

T = TypeVar("T")


@dataclass(frozen=True)
class Connection:
    """Where the servers are, and how to ask them."""

    urls: tuple[str, ...]
    concurrency: int  # requests at a time per server
    timeout: float  # seconds per request
    max_retries: int  # times in a row that a request, or every server, may fail


@dataclass
class Server:
    """One server; ``known`` is what its check found out."""

    url: str
    known: Any = None
    running: int = 0
    failures: int = 0  # in a row
    resumes: float = 0.0  # monotonic time from which on it may be asked again


class UnavailableError(Exception):
    """A server did not answer, or said that it cannot now; ``wait``: the seconds it asks for, ``status``: of HTTP."""

    def __init__(self, message: str, *, status: int = 0, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


class RefusedError(Exception):
    """A server refused a request, and would refuse it again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Servers:
    """Asks servers from many threads."""

    def __init__(self, connection: Connection, check: Callable[[Server], Any]) -> None:
        """``check`` is called before a server is used, and after it was away; what it returns is ``known``."""
        self._connection, self._check = connection, check
        self._servers = [Server(url.rstrip("/").removesuffix("/v1")) for url in connection.urls]
        self._changed = threading.Condition()
        self._stopped = False

    def ask(self, request: Callable[[Server], T]) -> T:
        """Return what a request returns for one of the servers, which it is given.

        Raises LogitcaskError if it, or every server, failed too often.
        """
        failed = broken = 0
        while True:
            server = self._take()
            try:
                if server.known is None:
                    server.known = self._check(server)
                answer = request(server)
            except UnavailableError as error:
                self._release(server, error)
                failed, broken = failed + 1, broken + (error.status == 500)
                self._require_patience(server, error, failed, broken)
            except BaseException:
                self._release(server, None)
                raise
            else:
                self._release(server, None)
                return answer

    def stop(self) -> None:
        """Send no further request: those that wait for a server raise LogitcaskError."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _take(self) -> Server:
        """Wait for a server that may be asked, and count the request to it."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                ready = [each for each in self._servers if each.running < self._places(each) and each.resumes <= now]
                if ready:
                    server = min(ready, key=lambda each: (each.running, each.failures))
                    server.running += 1
                    return server
                soon = [each.resumes - now for each in self._servers if each.resumes > now]
                self._changed.wait(min(soon, default=None))
        raise LogitcaskError("stopped")

    def _places(self, server: Server) -> int:
        return 1 if server.failures or server.known is None else self._connection.concurrency

    def _release(self, server: Server, error: UnavailableError | None) -> None:
        with self._changed:
            server.running -= 1
            if error is None:
                server.failures = 0
            else:
                wait = min(FIRST_WAIT * 2**server.failures, LONGEST_WAIT) if error.wait is None else error.wait
                server.failures += 1
                server.resumes = time.monotonic() + wait
                if error.status != 429:
                    server.known = None  # another model may come back
            self._changed.notify_all()

    def _require_patience(self, server: Server, error: UnavailableError, failed: int, broken: int) -> None:
        most = self._connection.max_retries
        if broken > min(most, MAX_BROKEN):
            raise LogitcaskError(
                f"{server.url}: failed a request {broken} times: {error}: its log says why, perhaps a log-probability "
                "that is not a number; committed shards are kept"
            ) from error
        if failed > most or all(each.failures > most for each in self._servers):
            raise LogitcaskError(
                f"{server.url}: {error}, after {most} retries: start it and run the same command again to finish, or "
                "raise --max-retries; committed shards are kept"
            ) from error

    def get(self, server: Server, path: str) -> Any:
        """Return the JSON at a path of a server. Raises UnavailableError or RefusedError."""
        return self._send(server, path, None)

    def post(self, server: Server, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON that a server answers to some JSON. Raises UnavailableError or RefusedError."""
        return self._send(server, path, json.dumps(body).encode())

    def _send(self, server: Server, path: str, data: bytes | None) -> Any:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(server.url + path, data, headers)
        try:
            with _OPENER.open(request, timeout=self._connection.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise _http_error(error, path, key) from error
        except urllib.error.URLError as error:
            raise UnavailableError(f"no connection ({error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"the connection broke ({first_line(error) or type(error).__name__})") from error
        except ValueError as error:
            raise UnavailableError(f"{path}: the reply is not JSON") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        """Return None: the redirect is an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def _http_error(error: urllib.error.HTTPError, path: str, key: str) -> UnavailableError | RefusedError:
    try:
        text = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    message = f"{path}: HTTP {error.code}: {shown(_reason(text).replace(key, '[key]') if key else _reason(text), 300)}"
    if error.code in TRANSIENT_STATUS or error.code >= 500:
        return UnavailableError(message, status=error.code, wait=_retry_after(error.headers.get("Retry-After")))
    return RefusedError(message, error.code)


def _reason(text: str) -> str:
    """Return the message of an error in JSON, by any of the layouts in use, else the text."""
    try:
        reply = json.loads(text)
        inner = reply.get("error", reply)
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError):
        return text


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date, at most ten minutes."""
    if header is None:
        return None
    try:
        seconds = (
            float(header) if header.strip()[:1].isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
        )
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
