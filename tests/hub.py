"""A local stand-in for the Hugging Face hub: the HTTP interface of the real client, in memory.

It keeps repositories of files, takes commits (small files inside them, safetensors through LFS's basic transfer), and
serves files under `resolve/`, as the hub does. The token decides who may write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER_TOKEN, READER_TOKEN = "hf_owner_secret", "hf_reader_secret"
LFS_SUFFIX = ".safetensors"


@dataclass
class Repository:
    """The files of one repository; every commit changes its hash."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((sorted(self.files.items()), self.messages)).encode()).hexdigest()


class Hub:
    """The server's state: repositories by ("models" or "datasets", id), LFS objects, and the received requests."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def add(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        self.repositories[kind, name] = Repository(private, dict(files))
        return self.repositories[kind, name]

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories["models", name].files

    def create(self, request: dict[str, Any]) -> tuple[int, Any]:
        name = f"{request.get('organization') or 'owner'}/{request['name']}"
        url = {"url": f"{self.url}/{name}", "name": name}
        if ("models", name) in self.repositories:
            return 409, {"error": "You already created this model repo", **url}
        self.add("models", name, {}, private=request.get("visibility") == "private")
        return 200, url

    def commit(self, kind: str, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        repository = self.repositories[kind, name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
            else:
                raise ValueError(f"the stand-in knows no operation {line['key']}")
        return {"success": True, "commitOid": repository.sha, "commitUrl": f"{self.url}/{name}/commit/{repository.sha}"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server on a free local port, inside this context."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Routes of the server, with the hub's status and error codes."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _serve(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.requests.append((self.command, path))
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                answer(self, **match.groupdict())
                return
        self._json(404, {"error": f"the stand-in has no {self.command} {path}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._answer(
            status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}
        )

    def _may_write(self) -> bool:
        if self._token == OWNER_TOKEN:
            return True
        if self._token == READER_TOKEN:
            self._refuse(403, "Forbidden: you don't have the required rights")
        else:
            self._refuse(401, "Invalid username or password.")
        return False

    def _repository(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get((kind or "models", name))
        if found is None or (found.private and self._token not in (OWNER_TOKEN, READER_TOKEN)):
            self._refuse(404 if self._token else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    # Writing.

    def create(self) -> None:
        if self._may_write():
            self._json(*self.hub.create(json.loads(self._body)))

    def validate(self) -> None:
        self._json(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str) -> None:
        if self._may_write() and self._repository(kind, name) is not None:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIX) else "regular"}
                for file in json.loads(self._body)["files"]
            ]
            self._json(200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})

    def lfs_batch(self, name: str) -> None:
        if self._may_write():
            objects = json.loads(self._body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in objects]
            self._json(200, {"transfer": "basic", "objects": actions})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self._body).hexdigest() == oid
        self.hub.objects[oid] = self._body
        self._json(200, {})

    def commit(self, kind: str, name: str) -> None:
        if self._may_write() and self._repository(kind, name) is not None:
            self._json(200, self.hub.commit(kind, name, [json.loads(line) for line in self._body.splitlines()]))

    # Reading.

    def info(self, kind: str, name: str) -> None:
        if (repository := self._repository(kind, name)) is not None:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            about = {"id": name, "sha": repository.sha, "private": repository.private, "tags": [], "downloads": 0}
            self._json(200, {**about, "siblings": siblings})

    def tree(self, kind: str, name: str, folder: str | None) -> None:
        if (repository := self._repository(kind, name)) is not None:
            inside = f"{folder}/" if folder else ""
            entries = [entry for entry in _entries(repository) if entry["path"].startswith(inside)]
            if "recursive=true" not in self.path.lower():
                entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]
            self._json(200, entries) if entries else self._refuse(404, "Not found", "EntryNotFound")

    def paths_info(self, kind: str, name: str) -> None:
        if (repository := self._repository(kind, name)) is not None:
            wanted = json.loads(self._body)["paths"]
            self._json(200, [entry for entry in _entries(repository) if entry["path"] in wanted])

    def resolve(self, kind: str | None, name: str, file: str) -> None:
        repository = self._repository(kind or "models", name)
        if repository is None:
            return
        if file not in repository.files:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        content = repository.files[file]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.sha}
        self._answer(200, content, {**headers, "Accept-Ranges": "bytes"})


def _entries(repository: Repository) -> list[dict[str, Any]]:
    folders = {path.rsplit("/", depth)[0] for path in repository.files for depth in range(1, path.count("/") + 1)}
    listed = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
    return listed + [
        {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        for path, content in sorted(repository.files.items())
    ]


_ID = r"(?P<name>[^/]+/[^/]+)"
_API = rf"api/(?P<kind>models|datasets)/{_ID}"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "api/repos/create", _Handler.create),
    (("POST",), "api/validate-yaml", _Handler.validate),
    (("POST",), rf"{_API}/preupload/.+", _Handler.preupload),
    (("POST",), rf"{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), rf"{_API}/commit/.+", _Handler.commit),
    (("GET",), rf"{_API}(/revision/.+)?", _Handler.info),
    (("GET",), rf"{_API}/tree/[^/]+(/(?P<folder>.+))?", _Handler.tree),
    (("POST",), rf"{_API}/paths-info/.+", _Handler.paths_info),
    (("GET", "HEAD"), rf"((?P<kind>datasets)/)?{_ID}/resolve/[^/]+/(?P<file>.+)", _Handler.resolve),
]
