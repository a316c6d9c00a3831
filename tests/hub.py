"""A local stand-in for the Hugging Face hub: the HTTP interface of the real client, in memory.

It keeps repositories of files, and serves files under `resolve/`, as the hub does. A private one needs the owner's
token.
"""

from __future__ import annotations

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

OWNER_TOKEN = "hf_owner_secret"


@dataclass
class Repository:
    """The files of one repository, whose hash they decide."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """The server's state: repositories by ("models" or "datasets", id), and the received requests."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def add(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        self.repositories[kind, name] = Repository(private, dict(files))
        return self.repositories[kind, name]


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

    def _repository(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get((kind or "models", name))
        if found is None or (found.private and self._token != OWNER_TOKEN):
            self._refuse(404 if self._token else 401, "Repository not found", "RepoNotFound")
            return None
        return found

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
    (("GET",), rf"{_API}(/revision/.+)?", _Handler.info),
    (("GET",), rf"{_API}/tree/[^/]+(/(?P<folder>.+))?", _Handler.tree),
    (("POST",), rf"{_API}/paths-info/.+", _Handler.paths_info),
    (("GET", "HEAD"), rf"((?P<kind>datasets)/)?{_ID}/resolve/[^/]+/(?P<file>.+)", _Handler.resolve),
]
