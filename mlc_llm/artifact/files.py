"""Files that are read whole or not at all, and written so. Knows no format but JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlc_llm.errors import CorruptFile, ModelNotFound


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelNotFound where there is no file, CorruptFile on bad text."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelNotFound(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise CorruptFile(f"{path} is not UTF-8 text; download or convert it again") from None
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not valid JSON ({error}); fetch or make it again") from None
    if not isinstance(data, dict):
        raise CorruptFile(f"{path} must hold a JSON object, it holds a {type(data).__name__}")
    return data


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
