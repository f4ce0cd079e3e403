"""What stands before the routes: who may ask, from where, and how much they may send.

Plain ASGI middlewares; each knows one rule. What a route does is not known here, nor are models.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import hashlib
import hmac
from collections.abc import Collection, Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlc_llm.errors import AuthenticationError
from mlc_llm.serve.errors import Failure, failure_of, failure_of_status

# How long a refused body is read on, so that its sender gets to read the answer.
_LINGER_S = 2.0
MAX_HEAD_BYTES = 64 * 1024


async def send_failure(
    scope: Scope, send: Send, failure: Failure, *, linger: Receive | None = None
) -> None:
    """Send an answer that says why the request of `scope` was not served.

    linger: where a body may still be coming, to read it for a while before the connection closes.
    """
    body = failure.body_bytes_for(scope["path"])
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= failure.headers
    if linger is not None:
        headers["connection"] = "close"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": linger is not None})
    if linger is not None:
        await _read_on(linger)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read_on(receive: Receive) -> None:
    async def read() -> None:
        while True:
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    try:
        await asyncio.wait_for(read(), _LINGER_S)
    except asyncio.TimeoutError:
        return


def headers_of(scope: Scope, name: bytes) -> list[bytes]:
    """Return the values of a header, in order; `name` is in lower case."""
    return [value for key, value in scope["headers"] if key == name]


class KeyGuard:
    """Asks for the API key on every path but `open_paths`.

    The path is the one that is routed; no header has a say in it. The key comes as
    `Authorization: Bearer KEY`, as the password of HTTP Basic, which browsers can be asked for, or
    as `x-api-key: KEY`, which Anthropic's clients send.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str] = ("/health",)) -> None:
        self._app = app
        self._digest = hashlib.sha256(key.encode()).digest()
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or answer 401."""
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        is_given = any(headers_of(scope, name) for name in (b"authorization", b"x-api-key"))
        failure = failure_of(
            AuthenticationError(
                "the API key is wrong"
                if is_given
                else "there is no API key; send the header `Authorization: Bearer KEY`"
            )
        )
        if not scope["path"].startswith("/v1/"):
            # A browser asks the person before it for the key only when challenged so.
            basic = {"www-authenticate": 'Basic realm="mlc_llm"'}
            failure = dataclasses.replace(failure, headers=basic)
        await send_failure(scope, send, failure, linger=receive)

    def _is_known(self, scope: Scope) -> bool:
        # Digests have one length, so the time of the comparison tells nothing of the key.
        bearers, keys = headers_of(scope, b"authorization"), headers_of(scope, b"x-api-key")
        if len(bearers) > 1 or len(keys) > 1:
            return False
        given = [*map(_secret_in, bearers), *(key.strip() for key in keys)]
        digests = [hashlib.sha256(secret).digest() for secret in given]
        return bool(digests) and all(
            [hmac.compare_digest(digest, self._digest) for digest in digests]
        )


def _secret_in(header: bytes) -> bytes:
    scheme, _, value = header.strip().partition(b" ")
    value = value.strip()
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


class HostGuard:
    """Answers only requests for hosts it knows, so that no web page can reach a local server.

    A page whose name is made to resolve to this machine (DNS rebinding) sends its own name as
    Host. Names are compared without port and case; `*` admits every host.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or answer 403."""
        if scope["type"] != "http" or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        message = "this server does not answer for that Host; add it with --allow-hosts"
        await send_failure(scope, send, failure_of_status(403, message), linger=receive)

    def _is_known(self, scope: Scope) -> bool:
        values = headers_of(scope, b"host")
        # HTTP/1.0 may come without one; browsers never do.
        return not values or "*" in self._hosts or (len(values) == 1 and self._admits(values[0]))

    def _admits(self, value: bytes) -> bool:
        host = value.decode("latin-1").lower()
        name, colon, port = host.rpartition(":")
        if colon and port.isdecimal():
            host = name
        return host in self._hosts


class SizeLimits:
    """Refuses large heads, and large bodies, by their announced length or by counting."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_head_bytes: int = MAX_HEAD_BYTES
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_head_bytes = max_head_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counted body, or answer 413 or 431."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        head_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if head_bytes > self._max_head_bytes:
            await send_failure(scope, send, head_too_large(self._max_head_bytes), linger=receive)
            return
        announced = headers_of(scope, b"content-length")
        if announced and int(announced[0]) > self._max_body_bytes:
            await send_failure(scope, send, failure_of(self._body_too_large()), linger=receive)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                await _read_on(receive)
                raise self._body_too_large()
            return message

        await self._app(scope, counted, send)

    def _body_too_large(self) -> HTTPException:
        message = f"the body is larger than {self._max_body_bytes:,} bytes"
        return HTTPException(413, message, {"connection": "close"})


def head_too_large(max_bytes: int) -> Failure:
    """Return the answer to a request whose path and headers are too long."""
    text = f"path and headers of the request are larger than {max_bytes:,} bytes"
    return failure_of_status(431, text)
