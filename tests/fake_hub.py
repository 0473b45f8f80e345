"""A Hugging Face Hub of one's own: a local server with the part of the Hub's HTTP API that pushing and loading use.

Repositories with branches and commits, tokens with rights, files in LFS and in commits, redirections to a second host
for the former, and the headers from which the client makes its errors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USERS = {"hf_mine": "me", "hf_theirs": "them"}
LICENCES = {"apache-2.0", "mit", "other"}
BAD_TOKEN = "Invalid credentials in Authorization header"


class Refused(Exception):
    """An answer with an error: status, what is said, and the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    """``commits``: content by path of every commit; ``branches``: the newest commit; ``messages``: by commit."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch], self.messages[oid] = files, oid, message
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]

    @property
    def files(self) -> dict[str, bytes]:
        """Of ``main``."""
        return self.at("main")[1]


class FakeHub:
    """The state of the server; ``url`` is its ``HF_ENDPOINT``.

    Attributes:
        asked: method and path of every request.
        broken: the beginning of paths that are answered with error 500.
    """

    def __init__(self, port: int) -> None:
        self.url, self.elsewhere = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken: str | None = None

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial commit")
        return repo

    def repo(self, name: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != name.partition("/")[0]:
            raise Refused(403 if user else 401, f"Forbidden: you have no write access to {name}")
        return repo

    def answer(self, method: str, path: str, query: dict[str, list[str]], user: str | None, body: bytes) -> Any:
        """JSON, or (status, headers, content) of a file."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match method, *parts:
            case "GET", "api", "whoami-v2":
                return {"name": user, "type": "user", "orgs": []}
            case "POST", "api", "repos", "create":
                return self._create(json.loads(body), user)
            case "POST", "api", "validate-yaml":
                return _check_card(json.loads(body)["content"])
            case "POST", "api", "models", owner, name, "preupload", revision:
                files = self.repo(f"{owner}/{name}", user, write="create_pr" not in query).at(revision)[1]
                return {"files": [_mode(entry, files) for entry in json.loads(body)["files"]]}
            case "POST", owner, name, "info", "lfs", "objects", "batch":
                return self._batch(json.loads(body)["objects"])
            case "PUT", "lfs", oid:
                assert hashlib.sha256(body).hexdigest() == oid
                self.stored[oid] = body
                return {}
            case "POST", "api", "models", owner, name, "branch", branch:
                repo = self.repo(f"{owner}/{name}", user, write=True)
                if branch in repo.branches:
                    raise Refused(409, "Reference already exists")
                repo.branches[branch] = repo.branches["main"]
                return {}
            case "POST", "api", "models", owner, name, "commit", revision:
                return self._commit(f"{owner}/{name}", revision, user, body, "create_pr" in query)
            case "GET", "api", "models", owner, name, *rest if not rest or rest[0] in ("revision", "tree"):
                return self._listing(self.repo(f"{owner}/{name}", user), f"{owner}/{name}", rest)
            case (("GET" | "HEAD"), "lfs", oid):
                return 200, {"ETag": f'"{oid}"'}, self.stored[oid]
            case (("GET" | "HEAD"), owner, name, "resolve", revision, *file):
                return self._file(self.repo(f"{owner}/{name}", user), revision, "/".join(file))
        raise Refused(404, f"no such page: {method} {path}")

    def _create(self, asked: dict[str, Any], user: str | None) -> dict[str, str]:
        owner = asked["organization"] or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.repos:
            raise Refused(409, "You already created this model repo")
        self.add(name, {}, asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.url}/{name}", "name": name}

    def _batch(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        for entry in objects:
            if entry["oid"] not in self.stored:
                entry["actions"] = {"upload": {"href": f"{self.elsewhere}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, revision: str, user: str | None, body: bytes, create_pr: bool) -> dict[str, Any]:
        repo = self.repo(name, user, write=not create_pr)
        files, message = dict(repo.at(revision)[1]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        _check_card(files["README.md"].decode())
        branch = f"refs/pr/{len(repo.branches)}" if create_pr else revision
        oid = repo.commit(branch, files, message)
        return {
            "commitUrl": f"{self.url}/{name}/commit/{oid}",
            "commitOid": oid,
            "pullRequestUrl": f"{self.url}/{name}/discussions/{branch.rpartition('/')[2]}" if create_pr else None,
        }

    def _listing(self, repo: Repo, name: str, rest: list[str]) -> Any:
        oid, files = repo.at("/".join(rest[1:]) if len(rest) > 1 else "main")
        if rest[:1] == ["tree"]:
            return [{"type": "file", "path": path, **_described(path, data, "oid")} for path, data in files.items()]
        siblings = [{"rfilename": path, **_described(path, data, "sha256")} for path, data in files.items()]
        return {"id": name, "sha": oid, "private": repo.private, "tags": [], "downloads": 0, "siblings": siblings}

    def _file(self, repo: Repo, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        oid, files = repo.at(revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = files[path]
        if not _is_lfs(path):
            return 200, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": oid}, data
        key = hashlib.sha256(data).hexdigest()
        self.stored[key] = data
        headers = {
            "Location": f"{self.elsewhere}/lfs/{key}",
            "X-Linked-Etag": f'"{key}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": oid,
        }
        return 302, headers, b""


def _mode(entry: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    path = entry["path"]
    mode = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular", "shouldIgnore": False}
    if path in files:
        mode["oid"] = hashlib.sha256(files[path]).hexdigest() if _is_lfs(path) else _blob(files[path])
    return mode


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _described(path: str, data: bytes, key: str) -> dict[str, Any]:
    """Size and checksums, as the Hub lists them: with ``sha256`` in descriptions of models, ``oid`` in trees."""
    name = "blobId" if key == "sha256" else "oid"
    described: dict[str, Any] = {"size": len(data), name: _blob(data)}
    if _is_lfs(path):
        described["lfs"] = {key: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return described


def _check_card(text: str) -> dict[str, Any]:
    """What the Hub asks of the metadata."""
    data = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    if data.get("license", "mit") not in LICENCES:
        raise Refused(400, f'"license" must be one of {", ".join(sorted(LICENCES))}')
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            assert {"type"} <= result["task"].keys()
            assert {"type", "name"} <= result["dataset"].keys()
            assert all({"type", "value"} <= metric.keys() for metric in result["metrics"])
    return {"errors": [], "warnings": []}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        body, path = self._body(), urlsplit(self.path)
        self.hub.asked.append(f"{self.command} {unquote(path.path)}")
        try:
            answer = self._answer(path.path.replace(".git/info/lfs", "/info/lfs"), parse_qs(path.query), body)
        except Refused as error:
            content = {"error": str(error), "errors": [{"message": str(error)}]}
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            answer = error.status, headers, json.dumps(content).encode()
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if self.hub.broken is not None and path.startswith(self.hub.broken):
            raise Refused(507, "the disk of the Hub is full")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):
            assert not token, "a token was sent to another host"
        elif token and token not in USERS:
            raise Refused(401, BAD_TOKEN)
        return self.hub.answer(self.command, path, query, USERS.get(token), body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log would be part of what a test has captured."""


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A Hub that answers until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    server.daemon_threads = True
    hub = server.RequestHandlerClass.hub = FakeHub(server.server_address[1])  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
