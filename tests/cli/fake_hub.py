"""A hub of one repository on the loopback device, with the faults that a real one may show."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

REPOSITORY = "someone/small-gptj"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".zst", ".parquet")


class FakeHub:
    """Served files, faults of the hub, and a record of the requests."""

    def __init__(
        self, files: dict[str, bytes], kind: str = "model", repository: str = REPOSITORY
    ) -> None:
        self.files = files
        #: Of the repository: model or dataset.
        self.kind = kind
        self.repository = repository
        self.commit = COMMIT
        self.revisions = {"main", "float16"}
        #: Listed in the repository's information without being there.
        self.listed_only: list[str] = []
        #: Byte counts of a file after which an answer is cut, one for each answer.
        self.cut: dict[str, list[int]] = {}
        #: Statuses to answer with first: to questions about the repository, and to files.
        self.api_statuses: list[int] = []
        self.file_statuses: list[int] = []
        #: The hub's word for why it refuses everything, with a status.
        self.refusal: tuple[int, str] | None = None
        #: What is sent in place of a file's bytes, as often as stated.
        self.instead: dict[str, list[bytes]] = {}
        self.ignores_ranges = False
        self.answers_html = False
        #: Another server that files are fetched from.
        self.redirect: str | None = None

        self.requests: list[tuple[str, str]] = []
        self.authorizations: list[str | None] = []
        self.served: Counter[str] = Counter()

    @property
    def fetched(self) -> set[str]:
        """Names of files of which bytes were requested."""
        return {p.partition(f"/resolve/{self.commit}/")[2] for _, p in self.requests} - {""}

    def information(self) -> dict[str, Any]:
        """Return the hub's description of a repository with its blobs."""
        siblings = [_sibling(name, data) for name, data in self.files.items()]
        siblings += [_sibling(name, b"x" * 100) for name in self.listed_only]
        return {"id": self.repository, "sha": self.commit, "siblings": siblings, "private": False}


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git(data)}
    if name.endswith(LFS):
        sha256 = _etag(name, data)
        found["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
    return found


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(name: str, data: bytes) -> str:
    """Return the name of a file in the hub's cache; that of a large file is its Git LFS hash."""
    return hashlib.sha256(data).hexdigest() if name.endswith(LFS) else _git(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would wait 40 ms for an acknowledgement
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":
            return self._answer(404)
        self.hub.requests.append((self.command, path))
        self.hub.authorizations.append(self.headers.get("Authorization"))
        if self.hub.answers_html:
            return self._answer(200, b"<html>Log in to this hotel's network</html>", "text/html")
        about = f"/api/{self.hub.kind}s/"
        if path.startswith(about):
            return self._information(path.removeprefix(about))
        return self._file(path)

    do_HEAD = do_GET

    def _information(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        if self.hub.api_statuses:
            return self._answer(self.hub.api_statuses.pop(0))
        if self.hub.refusal:
            return self._answer(self.hub.refusal[0], code=self.hub.refusal[1])
        if repository != self.hub.repository:
            return self._answer(404, code="RepoNotFound")
        if revision and revision not in {*self.hub.revisions, self.hub.commit}:
            return self._answer(404, code="RevisionNotFound")
        return self._answer(200, json.dumps(self.hub.information()).encode(), "application/json")

    def _file(self, path: str) -> None:
        hub = self.hub
        place = "" if hub.kind == "model" else f"{hub.kind}s/"
        inner = path.removeprefix(f"/{place}{hub.repository}/resolve/")
        revision, _, name = inner.partition("/")
        if revision not in {hub.commit, *hub.revisions}:
            return self._answer(404, code="RevisionNotFound")
        if hub.file_statuses:
            return self._answer(hub.file_statuses.pop(0))
        if name not in hub.files:
            return self._answer(404, code="EntryNotFound")
        if hub.redirect:
            self.send_response(302)
            self.send_header("Location", hub.redirect + path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = hub.instead[name].pop(0) if hub.instead.get(name) else hub.files[name]
        start, asked = 0, self.headers.get("Range")
        if asked and not hub.ignores_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self._answer(416)
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", f'"{_etag(name, data)}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if hub.cut.get(name):
            body = body[: hub.cut[name].pop(0)]
            self.close_connection = True
        hub.served[name] += len(body)
        self.wfile.write(body)
        return None

    def _answer(
        self, status: int, body: bytes = b"", kind: str = "text/plain", code: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.send_header("X-HF-Warning", "news; a word from the hub")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up, as tests make them; anything else is a bug of this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client at an endpoint; it has read its variables when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def client_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolate the client from the machine's token and cache, and shorten its waits."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("gptj_convert.hub.client.WAIT", 0.001)
    yield
    huggingface_hub.close_session()


def refused_endpoint() -> str:
    """Return an address where nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serve the hub; yields the address for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
