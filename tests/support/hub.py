"""The part of the Hugging Face hub's HTTP protocol that its client's reads, uploads and commits use, in memory.

Written from the requests of huggingface_hub 2.4: repositories of three kinds, branches and commits, LFS objects, trees
by pages, a token that may write and one that may not. Files with a zero byte are LFS objects. Nothing of Xet.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

WRITER, READER = "hf_writer", "hf_reader"
PAGE = 40  # entries of a page of a tree
Files = dict[str, tuple[bytes, bool]]  # by path: the bytes, whether they are an LFS object


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, str, Files]] = field(default_factory=list)  # id, title, files
    refs: dict[str, str] = field(default_factory=dict)  # tags and branches, by name the id of a commit

    def commit(self, title: str, files: Files, branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append((sha, title, files))
        self.refs[branch] = sha
        return sha

    def files(self, revision: str) -> Files:
        sha = self.refs.get(revision, revision)
        return next(files for each, _, files in self.commits if each == sha)  # StopIteration: no such revision


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Hub:
    port: int = 0
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)  # by kind ("datasets") and name
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by SHA-256
    uploads: int = 0
    requests: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # commits to come: "before" or "after" which the connection breaks

    def make(self, name: str, kind: str = "datasets", *, private: bool = False) -> Repository:
        made = self.repositories[kind, name] = Repository(private)
        made.commit("initial commit", {".gitattributes": (b"*.bin filter=lfs\n", False)})
        return made

    def titles(self, name: str, kind: str = "datasets") -> list[str]:
        return [title for _, title, _ in self.repositories[kind, name].commits][1:]


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes, lfs: bool) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    oid = hashlib.sha256(data).hexdigest()
    return {**found, "lfs": {"oid": oid, "size": len(data), "pointerSize": 134}} if lfs else found


def tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries of a folder, folders included."""
    below = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, (data, lfs) in sorted(files.items()):
        if path.startswith(below):
            parts = path.removeprefix(below).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = below + "/".join(parts[:depth])
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                found[path] = entry(path, data, lfs)
    return [found[name] for name in sorted(found)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, value: Any = None, headers: dict[str, str] | None = None, *, data: bytes | None = None, status: int = 200
    ) -> None:
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            self.route([unquote(part) for part in url.path.strip("/").split("/")])
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self.answer({"error": refused.code}, headers, status=refused.status)
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repository(self, kind: str, name: str, *, write: bool = False) -> Repository:
        token = self.token()
        if token not in ("", WRITER, READER):
            raise Refused(401, "InvalidToken")
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and token != WRITER):
            raise Refused(404 if token else 401, "RepoNotFound")
        if write and token != WRITER:
            raise Refused(403 if token else 401, "")
        return found

    def route(self, parts: list[str]) -> None:
        if parts[0] == "lfs":
            if hashlib.sha256(self.body).hexdigest() != parts[1]:
                raise Refused(400, "BadDigest")
            self.hub.objects[parts[1]] = self.body
            self.hub.uploads += 1
            self.answer({})
        elif parts[:2] == ["api", "validate-yaml"]:
            front = json.loads(self.body)["content"].split("---\n")[1]
            try:
                bad = [] if isinstance(yaml.safe_load(front), dict) else ["must be a mapping"]
            except yaml.YAMLError as error:
                bad = [str(error)]
            self.answer({"errors": [{"message": each} for each in bad], "warnings": []}, status=400 if bad else 200)
        elif parts[:3] == ["api", "repos", "create"]:
            self.create(json.loads(self.body))
        elif parts[:2] == ["api", "whoami-v2"]:
            self.answer({"type": "user", "name": "me", "fullname": "me", "orgs": [], "auth": {}})
        elif parts[0] == "api":
            self.api(parts[1], "/".join(parts[2:4]), parts[4:])
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self.batch()
        else:
            kind = parts[0] if parts[0] in ("datasets", "spaces") else "models"
            rest = parts[1:] if kind != "models" else parts
            assert rest[2] == "resolve", self.path
            self.resolve(self.repository(kind, "/".join(rest[:2])), rest[3], "/".join(rest[4:]))

    def create(self, asked: dict[str, Any]) -> None:
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.token() != WRITER:
            raise Refused(403 if self.token() else 401, "")
        url = f"http://127.0.0.1:{self.hub.port}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.hub.repositories:
            self.answer({"error": "exists", "url": url}, status=409)
        else:
            self.hub.make(name, kind, private=asked.get("private") or asked.get("visibility") == "private")
            self.answer({"url": url, "name": name, "id": name})

    def api(self, kind: str, name: str, rest: list[str]) -> None:
        action, revision = (*rest, "revision", "main")[:2] if rest else ("revision", "main")
        found = self.repository(kind, name, write=action in ("preupload", "commit"))
        try:
            files = found.files(revision)
        except StopIteration:
            raise Refused(404, "RevisionNotFound") from None
        if action == "revision":
            sha = found.refs.get(revision, revision)
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings})
        elif action == "tree":
            self.tree(files, "/".join(rest[2:]))
        elif action == "paths-info":
            wanted = parse_qs(self.body.decode())["paths"]
            folders = {"type": "directory", "size": 0, "oid": "0" * 40}
            known = [entry(p, *files[p]) if p in files else {**folders, "path": p} for p in wanted]
            self.answer([each for each in known if each["type"] == "file" or tree(files, str(each["path"]), False)])
        elif action == "preupload":
            asked = json.loads(self.body)["files"]
            modes = []
            for file in asked:
                lfs = b"\0" in base64.b64decode(file["sample"])
                have = files.get(file["path"])
                oid = None if have is None else (hashlib.sha256(have[0]).hexdigest() if have[1] else blob_id(have[0]))
                mode = "lfs" if lfs else "regular"
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer({"files": modes})
        else:
            assert action == "commit", self.path
            self.commit(found, revision, dict(files))

    def tree(self, files: Files, folder: str) -> None:
        entries = tree(files, folder, self.query.get("recursive", "").lower() == "true")
        if folder and not entries:
            raise Refused(404, "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        plain = self.path.split("?")[0]
        query = f"recursive={self.query.get('recursive', 'false')}&cursor={start + PAGE}"
        more = {"Link": f'<http://127.0.0.1:{self.hub.port}{plain}?{query}>; rel="next"'}
        self.answer(entries[start : start + PAGE], more if start + PAGE < len(entries) else {})

    def batch(self) -> None:
        if self.token() != WRITER:
            raise Refused(403, "")
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            if each["oid"] in self.hub.objects
            else {**each, "actions": {"upload": {"href": f"http://127.0.0.1:{self.hub.port}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, found: Repository, branch: str, files: Files) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        broken = self.hub.broken.pop(0) if self.hub.broken else ""
        if broken == "before":
            raise ConnectionError
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, "MissingObject")
                files[value["path"]] = (self.hub.objects[value["oid"]], True)
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        sha = found.commit(lines[0]["value"]["summary"], files, branch)
        if broken == "after":
            raise ConnectionError
        self.answer({"commitUrl": f"http://127.0.0.1:{self.hub.port}/me/x/commit/{sha}", "commitOid": sha})

    def resolve(self, found: Repository, revision: str, path: str) -> None:
        try:
            data = found.files(revision)[path][0]
        except StopIteration:
            raise Refused(404, "RevisionNotFound") from None
        except KeyError:
            raise Refused(404, "EntryNotFound") from None
        sha = found.refs.get(revision, revision)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(data)}"', "Content-Type": "application/octet-stream"}
        ranged = self.headers.get("Range", "").removeprefix("bytes=")
        if not ranged:
            self.answer(headers=headers, data=data)
            return
        first, last = ranged.split("-")
        if int(first) >= len(data):
            raise Refused(416, "")
        cut = data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(headers=headers, data=cut, status=206)


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve an empty hub in this process."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def reach(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str = WRITER) -> None:
    """Point the client in this process, which read its environment long ago, at a hub."""
    from huggingface_hub import constants

    endpoint = f"http://127.0.0.1:{hub.port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
