"""The settings beside a tokenizer: `tokenizer_config.json` and `special_tokens_map.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc_llm.artifact import read_json_object

SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def read_settings(directory: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, completed by special_tokens_map.json; {} if neither is."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", SETTINGS_NAME):
        if (directory / name).is_file():
            found = read_json_object(directory / name)
            settings.update({key: value for key, value in found.items() if value is not None})
    return settings


def special_tokens_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens that settings give, such as `bos_token`."""
    named = ((name, token_text(settings.get(name))) for name in SPECIAL_TOKENS)
    return {name: text for name, text in named if text is not None}


def token_text(value: Any) -> str | None:
    """Return the text of a token given as a string or as an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
