"""Conversation templates in MLC LLM's form: named ones, and those inside a chat config.

Knows how messages become text by role strings and separators. Does not know Jinja beyond telling
which named template a Jinja source resembles.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc_llm.errors import CorruptFile, OptionError, RequestError

PLAIN = "LM"  # the named template that only joins contents
_SYSTEM, _FUNCTIONS = "{system_message}", "{function_string}"
_CONVERSATIONS_PATH = Path(__file__).with_name("conversations.json")
_MAX_NAMES_SHOWN = 8
# Fields of `conv_config` in releases before 2024: other names, and what the template itself says.
_OLD_FIELDS = {
    "system": "system_template",
    "role_msg_sep": "role_content_sep",
    "stop_tokens": "stop_token_ids",
    "prefix_tokens": "system_prefix_token_ids",
}
_OLD_FIELDS_IN_TEMPLATE = ("name", "offset", "separator_style", "add_bos")
# Signs in a Jinja source, all of which must be there, and the named template they stand for;
# the first that fits counts, so the narrower one comes first. None: nothing named is like it.
_SIGNS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("<|start_header_id|>", "ipython"), "llama-3_1"),
    (("<|start_header_id|>",), "llama-3"),
    (("<|header_start|>",), "llama-4"),
    (("<|im_sep|>",), None),
    (("<|im_start|>", "enable_thinking"), "qwen3"),
    (("<|im_start|>", "You are Qwen"), "qwen2"),
    (("<|im_start|>",), "chatml"),
    (("<start_of_turn>", "<start_of_image>"), "gemma3_instruction"),
    (("<start_of_turn>",), "gemma_instruction"),
    (("[SYSTEM_PROMPT]", "[INST]"), "ministral3"),
    (("[INST]", "<<SYS>>"), "llama-2"),
    (("[INST]",), "mistral_default"),
    (("<|user|>", "<|end|>"), "phi-3"),
    (("<|user|>", "<|system|>", "eos_token"), "tinyllama_v1_0"),
    (("<|user|>", "<|endoftext|>"), "stablelm-2"),
    (("<|user|>", "eos_token"), "stablelm-2"),
    (("<\uff5cUser\uff5c>",), "deepseek_v3"),
    (("<|START_OF_TURN_TOKEN|>",), "aya-23"),
    (("<extra_id_1>",), "nemotron"),
    (("<|prompter|>",), "oasst"),
    (("User: ", "Assistant: ", "eos_token"), "deepseek_v2"),
)


def _default_role_templates() -> dict[str, str]:
    return {role: f"{{{role}_message}}" for role in ("user", "assistant", "tool")}


@dataclass(frozen=True)
class Conversation:
    """A conversation template, with the fields of `conv_template` in a chat config."""

    name: str = PLAIN
    system_template: str = _SYSTEM
    system_message: str = ""
    system_prefix_token_ids: list[int] = field(default_factory=list)
    add_role_after_system_message: bool = True
    roles: dict[str, str] = field(default_factory=lambda: {"user": "", "assistant": ""})
    role_templates: dict[str, str] = field(default_factory=_default_role_templates)
    messages: list[list[str]] = field(default_factory=list)
    seps: list[str] = field(default_factory=lambda: [""])
    role_content_sep: str = ""
    role_empty_sep: str = ""
    stop_str: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    strip_reasoning_in_history: bool = False
    function_string: str = ""
    use_function_calling: bool = False

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str) -> Conversation:
        """Read the `conv_template` object of a chat config; `where` names the file in errors.

        An object with nothing but a name stands for the named template, `conv_config` holds what
        old releases changed of it. Unknown fields are left out. Raises CorruptFile where a field
        has the wrong type, OptionError for an unknown name.
        """
        if "conv_config" in data:
            rest = {name: value for name, value in data.items() if name != "conv_config"}
            base = Conversation.from_json(rest, where)
            changes = _old_changes(data["conv_config"], base, where)
            return Conversation.from_json({**base.to_json(), **changes}, where)
        if set(data) == {"name"}:
            return get_conversation(str(data["name"]))
        values: dict[str, Any] = {}
        for spec in dataclasses.fields(Conversation):
            value = data.get(spec.name)
            if value is None:
                continue
            if not _FIELD_CHECKS[str(spec.type)](value):
                raise CorruptFile(
                    f"{where}: conv_template field {spec.name!r} must be {spec.type}, it is "
                    f"{str(value)[:80]!r}; run gen_config again"
                )
            values[spec.name] = value
        if len(values.get("seps", [""])) not in (1, 2):
            raise CorruptFile(f"{where}: conv_template field 'seps' must have 1 or 2 entries")
        values["role_templates"] = _default_role_templates() | values.get("role_templates", {})
        return Conversation(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `from_json` reads."""
        return dataclasses.asdict(self)

    @property
    def has_system(self) -> bool:
        """Whether there is a place for a system message."""
        return _SYSTEM in self.system_template

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt text of messages with `role` and text `content`, open for an answer.

        The ids in `system_prefix_token_ids` go before it. Raises RequestError for a role the
        template does not have and for a system message after the first place.
        """
        system, turns = self._split_system(messages)
        templates = self._fill_function_string(turns)
        system = templates[0].replace(_SYSTEM, system)
        parts = [system]
        for number, (message, template) in enumerate(zip(turns, templates[1:], strict=True)):
            role = message["role"]
            if number > 0 or not system or self.add_role_after_system_message:
                parts.append(self.roles[role] + self.role_content_sep)
            content = message["content"]
            if role == "assistant" and self.strip_reasoning_in_history:
                content = _strip_reasoning(content)
            parts.append(template.replace(f"{{{role}_message}}", content))
            parts.append(self.seps[-1] if role == "assistant" else self.seps[0])
        parts.append(self.roles["assistant"] + self.role_empty_sep)
        return "".join(parts)

    def _split_system(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[Mapping[str, Any]]]:
        """Return the system message in force, and the turns, the template's own ones first."""
        system = self.system_message
        turns: list[Mapping[str, Any]] = [
            {"role": role, "content": content} for role, content in self.messages
        ]
        for number, message in enumerate(messages):
            role = message["role"]
            if role == "system" and number > 0:
                raise RequestError(f"message {number} is a system message; it must come first")
            if role == "system":
                if _SYSTEM not in self.system_template:
                    raise RequestError(
                        f"conversation template {self.name!r} has no place for a system message; "
                        "leave it out"
                    )
                system = message["content"]
            elif role in self.roles:
                turns.append(message)
            else:
                raise RequestError(
                    f"message {number} has role {role!r}; conversation template {self.name!r} "
                    f"has roles system, {', '.join(self.roles)}"
                )
        return system, turns

    def _fill_function_string(self, turns: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the system template and one per turn, the functions in the last place for them.

        Done before contents are filled in, so that a content cannot ask for the functions.
        """
        templates = [
            self.system_template,
            *(self.role_templates.get(turn["role"], "") for turn in turns),
        ]
        functions = self.function_string if self.use_function_calling else ""
        for number in reversed(range(len(templates))):
            head, placeholder, tail = templates[number].rpartition(_FUNCTIONS)
            if placeholder:
                templates[number] = head.replace(_FUNCTIONS, "") + functions + tail
                functions = ""
        return templates


def _old_changes(config: Any, base: Conversation, where: str) -> dict[str, Any]:
    """Return the fields that a `conv_config` changes, under the names they have now."""
    if not isinstance(config, Mapping):
        raise CorruptFile(f"{where}: conv_config must be an object, it is {config!r:.80}")
    changes: dict[str, Any] = {}
    for name, value in config.items():
        if name in _OLD_FIELDS_IN_TEMPLATE or value is None:
            continue
        now = _OLD_FIELDS.get(name, name)
        if name == "system" and base.system_template == _SYSTEM:
            now = "system_message"
        if now not in {spec.name for spec in dataclasses.fields(Conversation)}:
            raise CorruptFile(f"{where}: conv_config has an unknown field {name!r:.40}; remove it")
        if now == "roles" and isinstance(value, list) and len(value) == 2:
            value = dict(zip(("user", "assistant"), value, strict=True))
        changes[now] = [value] if now == "stop_str" and isinstance(value, str) else value
    return changes


def _is_list_of(kind: type) -> Any:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_text_by_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_list_of_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(item, str) for item in pair)
        for pair in value
    )


_FIELD_CHECKS: dict[str, Any] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "list[int]": _is_list_of(int),
    "list[str]": _is_list_of(str),
    "list[list[str]]": _is_list_of_pairs,
    "dict[str, str]": _is_text_by_text,
}


def _strip_reasoning(content: str) -> str:
    """Return an answer without the thoughts before it."""
    _, marker, answer = content.rpartition("</think>")
    return answer.lstrip("\n") if marker else content


@functools.cache
def _read_conversations() -> dict[str, Conversation]:
    data = json.loads(_CONVERSATIONS_PATH.read_text(encoding="utf-8"))
    return {
        name: Conversation.from_json({"name": name, **fields}, str(_CONVERSATIONS_PATH))
        for name, fields in data.items()
    }


def conversation_names() -> list[str]:
    """Return the names of all named templates."""
    return list(_read_conversations())


def get_conversation(name: str) -> Conversation:
    """Return a named template. Raises OptionError listing names like it."""
    found = _read_conversations().get(name)
    if found is None:
        raise OptionError(
            f"there is no conversation template {name!r}; {_hint(name)}, "
            "or 'auto' for the model's own"
        )
    return found


def _hint(name: str) -> str:
    """Say which names there are: the ones most like `name`, not all of fifty."""
    names = conversation_names()
    shown = difflib.get_close_matches(name, names, _MAX_NAMES_SHOWN, cutoff=0.0)
    return f"use one of {', '.join(shown)} and {len(names) - len(shown)} more"


def detect_conversation(jinja_source: str) -> str | None:
    """Return the named template whose markers a Jinja source uses, or None.

    A guess for readers without Jinja: text is laid out alike, ids belong to another model.
    """
    for signs, name in _SIGNS:
        if all(sign in jinja_source for sign in signs):
            return name
    return None
