"""A small OpenAI server for the tests of the load generator: counts words, answers "a a a".

What it does wrong, and how it frames its answers, are attributes.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OVERHEAD = 10  # tokens around the message of a chat


class FakeOpenAI:
    """Listens on a free port; used as a context manager. `bodies` has what was asked."""

    def __init__(self, **changes: Any) -> None:
        self.framing = "chunked"  # or "close"
        self.tokenize = ""  # "prompt" or "content": the field that /tokenize reads
        self.tokens_per_word = 1
        self.long_words: set[str] = set()  # these have a token more
        self.knows_ignore_eos = True
        self.has_usage = True
        self.api_key = ""
        self.status = 200  # of completions
        self.ending = "data: [DONE]\n\n"
        self.event_delay_s = 0.0
        self.prefill_delay_s = 0.0  # for each token of a prompt that no earlier one began with
        self.seconds = (0.0, 0.0)  # of steps, and of them outside the library, for each request
        vars(self).update(changes)
        self.bodies: list[dict[str, Any]] = []
        self.last_text = ""
        self.num_running = 0
        self.most_running = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.fake = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def count(self, text: str) -> int:
        """Return the tokens of a text."""
        return sum(self.tokens_per_word + (word in self.long_words) for word in text.split())

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> FakeOpenAI:
        return self.server.fake  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        if not self._is_allowed():
            return
        if self.path == "/metrics":
            self._answer_metrics()
        elif self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "fake"}]})
        else:
            self._answer(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        if self.path == "/tokenize" and self.fake.tokenize in body:
            text = body[self.fake.tokenize]
            self._answer(200, {"tokens": [1] * self.fake.count(text)})
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            self.fake.bodies.append(body)
            self._complete(body)
        else:
            self._answer(404, {"error": {"message": "no such route"}})

    def _answer_metrics(self) -> None:
        steps, outside = (len(self.fake.bodies) * seconds for seconds in self.fake.seconds)
        text = (
            f'mlc_llm_step_time_seconds_sum{{model_name="fake"}} {steps}\n'
            f'mlc_llm_step_time_outside_library_seconds_sum{{model_name="fake"}} {outside}\n'
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def _is_allowed(self) -> bool:
        wanted = f"Bearer {self.fake.api_key}" if self.fake.api_key else None
        if self.headers.get("Authorization") == wanted:
            return True
        self._answer(401, {"error": {"message": "wrong key"}})
        return False

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _complete(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if fake.status != 200:
            self._answer(fake.status, {"error": {"message": f"refused with {fake.status}"}})
            return
        if "ignore_eos" in body and not fake.knows_ignore_eos:
            self._answer(400, {"error": {"message": "unknown field ignore_eos"}})
            return
        with fake.lock:
            fake.num_running += 1
            fake.most_running = max(fake.most_running, fake.num_running)
        try:
            self._stream(body)
        finally:
            with fake.lock:
                fake.num_running -= 1

    def _stream(self, body: dict[str, Any]) -> None:
        fake = self.fake
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        if fake.framing == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        is_chat = "messages" in body
        texts = [m["content"] for m in body["messages"]] if is_chat else [body["prompt"]]
        text = " ".join(texts)
        is_cached = text.startswith(fake.last_text or " ")
        fake.last_text = text
        time.sleep(0 if is_cached else fake.prefill_delay_s * fake.count(text))
        if is_chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            time.sleep(fake.event_delay_s)
            self._event({"choices": [{"delta": {"content": "a "}} if is_chat else {"text": "a "}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {
            "prompt_tokens": fake.count(text) + (OVERHEAD if is_chat else 0),
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        if fake.has_usage:
            self._event({"choices": [], "usage": usage})
        self._write(fake.ending)
        if fake.framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, content: Any) -> None:
        text = f"data: {json.dumps(content)}\n\n"
        # In two pieces, so that events are cut at odd places.
        self._write(text[:15])
        self._write(text[15:])

    def _write(self, text: str) -> None:
        data = text.encode()
        if self.fake.framing == "chunked" and data:
            data = f"{len(data):x}\r\n".encode() + data + b"\r\n"
        self.wfile.write(data)
        self.wfile.flush()
