"""The built-in pages, of the chat and of the API: files, and the rules browsers run them by."""

from __future__ import annotations

from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
# Nothing from elsewhere, nothing inline, in no other site's frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class ChatPage:
    """Serves the pages' files by their names; only what was there at the start exists."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str]] = {}
        for entry in files("mlc_llm.serve").joinpath("page").iterdir():
            kind = _TYPES.get(entry.name[entry.name.rfind(".") :])
            if kind is not None:
                self._files[entry.name] = entry.read_bytes(), kind

    def answer(self, name: str) -> Response:
        """Return a file, as an answer. Raises HTTPException where there is none of that name."""
        if name not in self._files:
            raise HTTPException(404, "the page has no such file")
        content, kind = self._files[name]
        return Response(content, media_type=kind, headers=_HEADERS)
