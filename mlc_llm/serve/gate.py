"""The outermost layer of the server: names every request, counts it, and lets no exception out.

Knows whether the server is shutting down. Knows no route and no model.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import Counter, defaultdict

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlc_llm.errors import EngineStopped
from mlc_llm.serve.errors import failure_of
from mlc_llm.serve.guard import headers_of, send_failure

REQUEST_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# What is answered while the server shuts down.
_ALWAYS_OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})

_log = logging.getLogger("mlc_llm.serve")


class Traffic:
    """What has passed the gate; shared with the routes that report it."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.is_draining = False
        self._answers: Counter[tuple[str, str, int]] = Counter()
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers[method, route, status] += 1
        self._seconds[method, route] += seconds

    def prometheus_text(self) -> str:
        """Return the counts in Prometheus' text format."""
        lines = [
            "# HELP mlc_llm_http_requests_total HTTP requests that were answered.",
            "# TYPE mlc_llm_http_requests_total counter",
        ]
        for (method, route, status), count in sorted(self._answers.items()):
            labels = f'method="{method}",handler="{route}",status="{status}"'
            lines.append(f"mlc_llm_http_requests_total{{{labels}}} {count}")
        lines += [
            "# HELP mlc_llm_http_request_duration_seconds Time until the end of the answer.",
            "# TYPE mlc_llm_http_request_duration_seconds summary",
        ]
        totals: Counter[tuple[str, str]] = Counter()
        for (method, route, _), count in self._answers.items():
            totals[method, route] += count
        for (method, route), count in sorted(totals.items()):
            labels = f'method="{method}",handler="{route}"'
            name = "mlc_llm_http_request_duration_seconds"
            lines.append(f"{name}_sum{{{labels}}} {self._seconds[method, route]:.6f}")
            lines.append(f"{name}_count{{{labels}}} {count}")
        lines += [
            "# HELP mlc_llm_http_requests_in_flight HTTP requests being answered.",
            "# TYPE mlc_llm_http_requests_in_flight gauge",
            f"mlc_llm_http_requests_in_flight {self.num_in_flight}",
        ]
        return "\n".join(lines) + "\n"


class Gate:
    """Gives requests their id, counts them, and answers what nothing else has answered."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; an exception becomes an answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started_at = time.monotonic()
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (REQUEST_ID_HEADER, request_id.encode()),
                ]
            await send(message)

        self._traffic.num_in_flight += 1
        try:
            if self._traffic.is_draining and scope["path"] not in _ALWAYS_OPEN:
                stopping = EngineStopped("the server is shutting down; ask another one")
                await send_failure(scope, named, failure_of(stopping), linger=receive)
                return
            await self._app(scope, receive, named)
        except ClientDisconnect:
            _log.debug("request %s: the client has gone", request_id)
        except Exception as error:
            failure = failure_of(error)
            if failure.status >= 500 and failure.code == "internal_error":
                _log.error("request %s failed", request_id, exc_info=error)
            if status:
                raise _Unfinished from None
            await send_failure(scope, named, failure)
        finally:
            self._traffic.num_in_flight -= 1
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._traffic.count(method, route, status, time.monotonic() - started_at)


class _Unfinished(Exception):
    """An answer broke off; the server closes its connection."""


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _request_id_of(scope: Scope) -> str:
    """Return the client's own id where it gave a fit one, or a new one."""
    given = headers_of(scope, REQUEST_ID_HEADER)
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return uuid.uuid4().hex
