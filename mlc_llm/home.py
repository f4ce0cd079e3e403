"""Where everything that is kept between runs lies: models, libraries, what they are built with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_root(environ: Mapping[str, str], *, windows: bool = os.name == "nt") -> Path:
    """Return the directory that environment variables choose, or the platform's default."""
    if chosen := environ.get("MLC_LLM_HOME"):
        return Path(chosen).expanduser().absolute()
    base = environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "mlc_llm"
    return Path.home() / ".cache" / "mlc_llm"
