"""A server that sends the chat page and answers it as a test has written down."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlc_llm.serve

PAGE = Path(mlc_llm.serve.__file__).parent / "page"
_KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Site:
    """Listens on a free port; used as a context manager. `bodies` has what was asked."""

    def __init__(self, pieces: list[str] | None = None, **changes: Any) -> None:
        self.pieces = ["Hel", "lo!"] if pieces is None else pieces
        self.delay_s = 0.0  # before each piece
        self.models = ["small-model"]
        self.api_key = ""
        self.finish_reason = "stop"
        self.usage: dict[str, Any] | None = {"prompt_tokens": 9, "completion_tokens": 2}
        self.failure: tuple[int, str] | None = None  # status and message; status 200: in the stream
        vars(self).update(changes)
        self.bodies: list[dict[str, Any]] = []
        self.is_closed = False
        self.was_left = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.site = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        """Answer nothing more; calling it again does nothing."""
        self.is_closed = True
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def site(self) -> Site:
        return self.server.site  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", (PAGE / "index.html").read_bytes())
        elif self.path.startswith("/page/"):
            path = PAGE / self.path.removeprefix("/page/")
            self._send(200, _KINDS[path.suffix], path.read_bytes())
        elif self._is_allowed():
            self._send_json(200, {"data": [{"id": name} for name in self.site.models]})

    def do_POST(self) -> None:
        if self.site.is_closed:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        self.site.bodies.append(body)
        failure = self.site.failure
        if failure is not None and failure[0] != 200:
            self._send_json(failure[0], {"error": {"message": failure[1]}})
            return
        try:
            self._stream()
        except OSError:
            self.site.was_left.set()

    def _is_allowed(self) -> bool:
        wanted = f"Bearer {self.site.api_key}" if self.site.api_key else None
        if self.headers.get("Authorization") == wanted:
            return True
        self._send_json(401, {"error": {"message": "There is no API key."}})
        return False

    def _stream(self) -> None:
        site = self.site
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in site.pieces:
            time.sleep(site.delay_s)
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if site.failure is not None:
            self._event({"error": {"message": site.failure[1]}})
            return
        self._event({"choices": [{"delta": {}, "finish_reason": site.finish_reason}]})
        if site.usage is not None:
            self._event({"choices": [], "usage": site.usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: Any) -> None:
        data = b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
        # In two pieces, so that events and characters are cut at odd places.
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.wfile.write(part)
            self.wfile.flush()

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", "default-src 'self'")
        self.end_headers()
        self.wfile.write(data)

    def _send_json(self, status: int, content: Any) -> None:
        self._send(status, "application/json", json.dumps(content).encode())
