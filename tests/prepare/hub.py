"""A Hugging Face Hub in a thread: the endpoints that downloading uses, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by revision; a gated one lists them to all, and wants the token for their content."""

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None


@dataclass
class LoggedRequest:
    """What a client asked."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class LocalHub:
    """`with LocalHub() as hub:` serves `hub.repositories` at `hub.endpoint`.

    cut_after: file name -> bytes after which the connection breaks, once each.
    failing_status: file name -> statuses to answer with, one a request, before the file is served.
    damaged: file names that are sent with the wrong bytes.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[LoggedRequest] = field(default_factory=list)
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    failing_status: dict[str, list[int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    ignores_ranges: bool = False

    def __enter__(self) -> LocalHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Go off the net; connections are refused from here on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.hang_up()
            self._server.server_close()

    @property
    def endpoint(self) -> str:
        """The address of the hub."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Publish a revision of a repository."""
        self.repositories.setdefault(repo_id, Repository({})).revisions[revision] = files

    def downloads(self, name: str) -> list[LoggedRequest]:
        """Return the GET requests for a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith("/" + name)]


def commit_of(files: dict[str, bytes]) -> str:
    """Return the commit hash the hub tells for these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    """Remembers its connections, so that going off the net breaks those kept alive too."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self._connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        authorization = self.headers.get("authorization")
        self.hub.requests.append(
            LoggedRequest(self.command, path, self.headers.get("range"), authorization)
        )
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            user, name, _, revision = parts[2:6]
            wanted = None
        else:
            user, name, _, revision = parts[:4]
            wanted = unquote("/".join(parts[4:]))
        repository = self.hub.repositories.get(f"{user}/{name}")
        if repository is None:
            return self._refuse(401, "RepoNotFound")
        by_commit = {commit_of(files): files for files in repository.revisions.values()}
        files = {**repository.revisions, **by_commit}.get(unquote(revision))
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if wanted is None:
            return self._send_listing(f"{user}/{name}", files)
        if repository.token and authorization != f"Bearer {repository.token}":
            return self._refuse(401, "GatedRepo")
        if wanted not in files:
            return self._refuse(404, "EntryNotFound")
        return self._send_file(wanted, files, with_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_listing(self, repo_id: str, files: dict[str, bytes]) -> None:
        siblings = []
        for name, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if not name.endswith((".json", ".jinja")):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"id": repo_id, "sha": commit_of(files), "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, name: str, files: dict[str, bytes], with_body: bool) -> None:
        statuses = self.hub.failing_status.get(name)
        if statuses:
            return self._refuse(statuses.pop(0), "")
        content = files[name]
        start = 0
        wanted_range = self.headers.get("range")
        if wanted_range and not self.hub.ignores_ranges:
            start = int(wanted_range.removeprefix("bytes=").partition("-")[0])
        if start > len(content):
            return self._refuse(416, "")
        body = content[start:]
        if name in self.hub.damaged:
            body = bytes(byte ^ 1 for byte in body)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(files))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        cuts = self.hub.cut_after.get(name)
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)
