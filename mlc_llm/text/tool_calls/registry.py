"""The formats of calls by name, and which of them a model writes. The table is formats.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.errors import OptionError
from mlc_llm.text.events import AnswerParser
from mlc_llm.text.tool_calls import (
    deepseek,
    gemma,
    glm_tags,
    harmony,
    hermes,
    json_form,
    llama,
    mistral,
    phi,
    qwen_xml,
)
from mlc_llm.text.tool_calls.reading import CallParser, Reader, new_call_id
from mlc_llm.text.tool_calls.tools import CallShape

AUTO = "auto"
GENERIC = "json"
HARMONY = "gpt_oss"
_PATH = Path(__file__).with_name("formats.json")
# Reader -> what begins a block, who reads it, and whether a bracket may begin an answer of calls.
_READERS: Mapping[str, tuple[tuple[str, ...], Reader, bool]] = {
    "deepseek": (deepseek.MARKERS, deepseek.read, False),
    "gemma": (gemma.MARKERS, gemma.read, True),
    "glm_tags": (glm_tags.MARKERS, glm_tags.read, False),
    "hermes": (hermes.MARKERS, hermes.read, False),
    "json_form": (json_form.MARKERS, json_form.read, True),
    "llama": (llama.MARKERS, llama.read, True),
    "mistral": (mistral.MARKERS, mistral.read, False),
    "phi": (phi.MARKERS, phi.read, False),
    "qwen_xml": (qwen_xml.MARKERS, qwen_xml.read, False),
}


@dataclass(frozen=True)
class CallFormat:
    """A way in which models write calls.

    signs: texts of chat templates, all of one group of which show that a model knows the format.
    families: model types that know it where the template does not tell.
    """

    name: str
    reader: str
    signs: tuple[tuple[str, ...], ...]
    families: tuple[str, ...]
    shape: CallShape

    def open_parser(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        *,
        holds_calls: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> AnswerParser:
        """Return a parser for one answer.

        tools: the schemas of arguments by name; what names another tool is content. holds_calls:
        tell of calls when they are whole, so that one that breaks off is content too. new_id:
        makes the ids of calls, of the format's own kind if left out.
        """
        new_id = new_id or (mistral.new_id if self.reader == "mistral" else new_call_id)
        if self.reader == "harmony":
            return harmony.HarmonyParser(tools, holds_calls=holds_calls, new_id=new_id)
        markers, read, starts_bare = _READERS[self.reader]
        return CallParser(
            markers,
            read,
            tools,
            starts_bare=starts_bare,
            holds_calls=holds_calls,
            new_id=new_id,
        )

    def fit_id(self, call_id: str) -> str:
        """Return the id by which the model's template may know a call."""
        return mistral.fit_id(call_id) if self.reader == "mistral" else call_id


@functools.cache
def _formats() -> dict[str, CallFormat]:
    table = json.loads(_PATH.read_text(encoding="utf-8"))
    formats = {}
    for name, row in table.items():
        shape = dict(row["shape"])
        shape["special"] = tuple(shape.get("special", ()))
        signs = tuple(tuple(group) for group in row["signs"])
        families = tuple(row["families"])
        formats[name] = CallFormat(name, row["reader"], signs, families, CallShape(**shape))
    return formats


def format_names() -> list[str]:
    """Return the names of all formats."""
    return list(_formats())


def get_format(name: str) -> CallFormat:
    """Return a format by its name. Raises OptionError."""
    found = _formats().get(name)
    if found is None:
        raise OptionError(
            f"there is no tool parser {name!r}; use {AUTO} or one of {', '.join(_formats())}"
        )
    return found


def detect_format(template: str | None, model_type: str) -> CallFormat:
    """Return the format of a model by the text of its chat template, else by its type.

    The generic one where neither tells: the model is told of it in the prompt.
    """
    formats = _formats().values()
    if template is not None:
        for form in formats:
            if any(all(sign in template for sign in group) for group in form.signs):
                return form
    for form in formats:
        if model_type in form.families:
            return form
    return _formats()[GENERIC]
