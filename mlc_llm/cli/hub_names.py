"""The ways in which people write the name of a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*([/@].*)?")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


def hub_name(model: str) -> str | None:
    """Return `HF://user/repo[/file.gguf][@revision]` for all ways to write it, None for others."""
    if model[:5].upper() == "HF://":
        return model
    address = urlsplit(model if "://" in model else f"https://{model}")
    if address.hostname in _HUB_HOSTS:
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        bare = "HF://" + "/".join(parts[:2])
        if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):
            file = "".join(f"/{part}" for part in parts[4:])
            return f"{bare}{file}@{parts[3]}"
        return "/".join([bare, *parts[2:]])
    if _PLAIN_NAME.fullmatch(model) and not is_path(model):
        return f"HF://{model}"
    return None


def is_path(text: str) -> bool:
    """Return whether there is something of that path on this machine."""
    try:
        return text.strip() != "" and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
