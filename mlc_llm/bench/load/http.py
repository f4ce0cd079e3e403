"""A small HTTP/1.1 client on asyncio: one connection a request, the body read as it arrives.

The generator shares the processor with the server it measures, so there are no pools, redirects or
compression here. Knows no OpenAI.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mlc_llm.errors import OptionError

_READ_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 10.0


class RequestFailed(Exception):
    """A request got no answer; `kind` is a short name to count by, `detail` what is known."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Server:
    """Where requests go: `prefix` ends with /v1 and begins the path of every OpenAI route."""

    url: str
    host: str
    port: int
    prefix: str
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None

    @staticmethod
    def parse(url: str, api_key: str | None = None) -> Server:
        """Read a URL with or without /v1 at its end. Raises OptionError."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise OptionError(f"{url} has a port that is not a number below 65,536") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"{url!r} is not a URL like http://127.0.0.1:8000")
        if parts.query or parts.fragment or parts.username:
            raise OptionError(f"{url} has more than host, port and path; leave the rest out")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise OptionError("--api-key has characters that no HTTP header may hold")
        is_secure = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return Server(
            url=url,
            host=parts.hostname,
            port=port or (443 if is_secure else 80),
            prefix=path if path.endswith("/v1") else f"{path}/v1",
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            tls=ssl.create_default_context() if is_secure else None,
        )

    @property
    def root(self) -> str:
        """Return the start of paths that are not OpenAI's, such as /tokenize."""
        return self.prefix.removesuffix("/v1")


class Answer:
    """Status, headers with lower-case names, and the body, which can be read once."""

    def __init__(
        self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader
    ) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises RequestFailed if it breaks off."""
        chunks = _ChunkDecoder() if self.headers.get("transfer-encoding") == "chunked" else None
        length = self.headers.get("content-length")
        left = int(length) if length is not None and length.isdigit() else None
        while not (left == 0 if chunks is None else chunks.is_done):
            data = await self._reader.read(_READ_BYTES)
            if not data:
                if chunks is None and left is None:
                    return
                raise RequestFailed("connection lost", "the body broke off")
            if chunks is not None:
                data = chunks.feed(data)
            elif left is not None:
                left -= len(data)
            if data:
                yield data

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces()])


class _ChunkDecoder:
    """Takes chunked bodies apart (RFC 9112, section 7.1); trailers are ignored."""

    def __init__(self) -> None:
        self.is_done = False
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """Return the payload of the chunks that are complete now."""
        buffer = self._buffer + data
        payloads = []
        while not self.is_done and (line_end := buffer.find(b"\r\n")) >= 0:
            try:
                size = int(buffer[:line_end].partition(b";")[0], 16)
            except ValueError:
                raise RequestFailed("bad answer", "the body has a chunk of no size") from None
            end = line_end + 2 + size
            if size == 0:
                self.is_done = True
            elif len(buffer) < end + 2:
                break
            payloads.append(buffer[line_end + 2 : end])
            buffer = buffer[end + 2 :]
        self._buffer = buffer
        return b"".join(payloads)


@asynccontextmanager
async def send(
    server: Server, method: str, path: str, body: bytes | None = None
) -> AsyncIterator[Answer]:
    """Send a request and read the head of its answer; the connection is closed on leaving.

    Raises RequestFailed.
    """
    try:
        connecting = asyncio.open_connection(server.host, server.port, ssl=server.tls)
        reader, writer = await asyncio.wait_for(connecting, _CONNECT_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise RequestFailed("cannot connect", f"no answer in {_CONNECT_TIMEOUT_S:.0f} s") from None
    except ConnectionRefusedError:
        raise RequestFailed("cannot connect", "nothing listens there") from None
    except OSError as error:
        raise RequestFailed("cannot connect", error.strerror or str(error)) from None
    try:
        writer.write(_head(server, method, path, body) + (body or b""))
        yield await _read_head(reader)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise RequestFailed("connection lost", "no whole answer came") from None
    except (asyncio.LimitOverrunError, ValueError):
        raise RequestFailed("bad answer", "it is no HTTP") from None
    finally:
        writer.transport.abort()


def _head(server: Server, method: str, path: str, body: bytes | None) -> bytes:
    host = f"[{server.host}]" if ":" in server.host else server.host
    headers = {
        "Host": f"{host}:{server.port}",
        "Accept": "*/*",
        "User-Agent": "mlc_llm-bench",
        "Connection": "close",
        **server.headers,
    }
    if body is not None:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


async def _read_head(reader: asyncio.StreamReader) -> Answer:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        status = int(first.split(" ", 2)[1]) if first.startswith("HTTP/1.") else -1
        if status < 0:
            raise ValueError(first)
        if status < 200:  # an interim answer such as 100 Continue
            continue
        pairs = (line.partition(":") for line in lines)
        return Answer(status, {n.strip().lower(): v.strip() for n, _, v in pairs}, reader)
