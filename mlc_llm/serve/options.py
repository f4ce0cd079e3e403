"""What a server is told by its command line: who may ask, and how much."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mlc_llm.errors import OptionError

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class AppOptions:
    """Who may ask, and how much. Raises OptionError.

    api_key: asked for on every path but /health. allow_origins: web pages that may ask; none by
    default. allow_hosts: names under which the server is asked; None for any. enable_debug: adds
    the routes /debug/* and takes debug_config in requests.
    """

    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    allow_hosts: tuple[str, ...] | None = None
    enable_debug: bool = False
    max_body_bytes: int = MAX_BODY_BYTES
    send_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
            raise OptionError("the API key must be printable ASCII text; choose another one")
        if key is not None and key != key.strip():
            raise OptionError("the API key has spaces at its ends; choose another one")
        if self.allow_credentials and not self.allow_origins:
            raise OptionError("--allow-credentials needs --allow-origins; name the pages' origins")
        if self.allow_credentials and "*" in self.allow_origins:
            raise OptionError(
                "--allow-credentials with --allow-origins '[\"*\"]' would let every web page act "
                "for its visitors; name the origins"
            )


def parse_list(name: str, text: str) -> list[str]:
    """Return the texts of an option given as a JSON list, as in `["*"]`. Raises OptionError."""
    try:
        values: Any = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise OptionError(f"{name} {text!r} is not a JSON list of texts, as in {name} '[\"*\"]'")
    return values
