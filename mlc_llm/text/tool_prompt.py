"""How tools, calls and results reach a prompt: by the model's own template, else as plain text.

What a template makes of them is found by trying: a tool, a call and a result with names that occur
nowhere else are rendered and looked for. Does not know token ids.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlc_llm.errors import RequestError, TemplateError
from mlc_llm.text.reasoning import with_thoughts_by_name
from mlc_llm.text.tool_calls.json_text import check_object
from mlc_llm.text.tool_calls.registry import CallFormat
from mlc_llm.text.tool_calls.tools import Tool, WrittenCall

Messages = list[dict[str, Any]]
Render = Callable[[Messages, Sequence[Mapping[str, Any]] | None], str]

_USER = {"role": "user", "content": "probe_user"}
_TOOL = Tool("probe_tool", "probe_description", {"type": "object", "properties": {}})
_ID = "abcdefghi"
_KEY = "probe_key"

INSTRUCTIONS = """You may call functions. They are, with the JSON schemas of their arguments:
{functions}

To call one, answer with nothing but this, where NAME is its name and {{...}} its arguments as JSON:
{example}
You are then told its result. Where no function helps, answer in plain text."""


@dataclass(frozen=True)
class Abilities:
    """What a template knows of tools.

    tools: it takes them as a variable, or in a system message, or not at all. arguments: as objects
    or as texts, None where it does not write calls. content: that of a message which only calls.
    results: whether it has messages of the role `tool`. system: whether it has system messages.
    several: whether it writes more than one call of a message.
    """

    tools: Literal["variable", "message"] | None = None
    arguments: Literal["object", "text"] | None = None
    content: str | None = ""
    results: bool = False
    system: bool = True
    several: bool = True


@dataclass(frozen=True)
class ToolMessages:
    """Messages as a template takes them, and the tools for its variable.

    bare: numbers of messages whose content the template wants to be null.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    bare: frozenset[int] = field(default_factory=frozenset)

    def with_bare(self, messages: Messages) -> Messages:
        """Return the messages, after their contents were checked, with those contents null."""
        return [
            {**message, "content": None} if number in self.bare else message
            for number, message in enumerate(messages)
        ]


class ToolPrompts:
    """Fits messages and tools to one template; safe to call from several threads."""

    def __init__(
        self, form: CallFormat, template: str | None, render: Render | None, has_system: bool = True
    ) -> None:
        """Keep the format that the model writes calls in.

        template: the text of its Jinja template, None where it has none; render: what runs that.
        has_system: without a Jinja template, whether there is a place for a system message.
        """
        self._form = form
        self._template = template or ""
        self._render = render
        self._has_system = has_system
        self._abilities: Abilities | None = None
        self._lock = threading.Lock()

    @property
    def abilities(self) -> Abilities:
        """What the template knows of tools."""
        with self._lock:
            if self._abilities is None:
                if self._render is None:
                    self._abilities = Abilities(system=self._has_system)
                else:
                    self._abilities = _find_abilities(self._render)
            return self._abilities

    def fit(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()
    ) -> ToolMessages:
        """Return messages as the template takes them, with the tools.

        Calls are as OpenAI's messages have them. Raises RequestError for results of no call and
        for arguments that are no object.
        """
        if not _are_messages(messages):
            return ToolMessages(messages)  # type: ignore[arg-type]  # whoever reads them says so
        told = [self._with_thoughts(message) for message in messages]
        if not tools and not any(_is_about_tools(message) for message in told):
            return ToolMessages(told)
        abilities = self.abilities
        fitted: Messages = []
        bare: set[int] = set()
        names: dict[str, str] = {}
        was_result = False
        for number, message in enumerate(told):
            if message.get("role") == "tool":
                self._add_result(fitted, message, names, number, joins=was_result)
                was_result = True
                continue
            was_result = False
            whole = dict(message)
            calls = _read_calls(message, number)
            names.update({str(call_id): call.name for call_id, call in calls})
            if calls and abilities.arguments is None:
                content = str(whole.get("content") or "")
                written = self._form.shape.write([call for _, call in calls])
                whole["content"] = f"{content}\n{written}" if content else written
                del whole["tool_calls"]
            elif calls:
                whole["tool_calls"] = [self._fit_call(call_id, call) for call_id, call in calls]
                if abilities.content is None and not whole.get("content"):
                    bare.add(len(fitted))
            fitted.append(whole)
        if not abilities.several:
            fitted, bare = _with_calls_apart(fitted, bare, abilities.content)
        variable = None
        if tools:
            described = [tool.to_template() for tool in tools]
            if abilities.tools == "variable":
                variable = described
            elif abilities.tools == "message":
                functions = json.dumps([tool["function"] for tool in described], ensure_ascii=False)
                bare = _shift(bare, _place_in_system(fitted, tools=functions))
            elif abilities.system:
                bare = _shift(bare, _place_in_system(fitted, text=self._instructions(described)))
            else:
                _place_in_user(fitted, self._instructions(described))
        return ToolMessages(fitted, variable, frozenset(bare))

    def _with_thoughts(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._render is None:
            # Templates without Jinja have no place for them.
            return {name: value for name, value in message.items() if name != "reasoning_content"}
        return with_thoughts_by_name(self._template, message)

    def _fit_call(self, call_id: str | None, call: WrittenCall) -> dict[str, Any]:
        is_object = self.abilities.arguments == "object"
        arguments: Any = call.arguments
        if is_object:
            arguments = json.loads(call.arguments, parse_int=_read_whole)
        fitted: dict[str, Any] = {
            "type": "function",
            "function": {"name": call.name, "arguments": arguments},
        }
        return fitted if call_id is None else {"id": self._form.fit_id(call_id), **fitted}

    def _add_result(
        self,
        fitted: Messages,
        message: Mapping[str, Any],
        names: Mapping[str, str],
        number: int,
        *,
        joins: bool,
    ) -> None:
        """Add a result: as it is, or as text of the user where the template has no place for it.

        joins: the message before is one too; many templates want users and assistants in turns.
        """
        call_id = message.get("tool_call_id")
        if call_id is not None and call_id not in names:
            raise RequestError(
                f"messages[{number}] is the result of the call {call_id!r:.80}, which no message "
                "before it makes; send the assistant's message with its tool_calls too",
                f"messages[{number}].tool_call_id",
            )
        name = message.get("name") or names.get(str(call_id), "")
        if self.abilities.arguments is not None and self.abilities.results:
            whole = dict(message)
            if name:
                whole["name"] = name
            if call_id is not None:
                whole["tool_call_id"] = self._form.fit_id(str(call_id))
            fitted.append(whole)
            return
        content = message.get("content")
        if not isinstance(content, str):
            content = "".join(str(part.get("text", "")) for part in content or ())
        text = f"Result of {name or 'the function'}: {content}"
        if joins:
            fitted[-1]["content"] += f"\n{text}"
        else:
            fitted.append({"role": "user", "content": text})

    def _instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        example = self._form.shape.write([WrittenCall("NAME", "{...}")])
        return INSTRUCTIONS.format(functions=functions, example=example)


def _find_abilities(render: Render) -> Abilities:
    def find(messages: Messages, *wanted: str, tools: bool = False) -> str | None:
        """Return what is rendered if all that is wanted is in it."""
        try:
            text = render(messages, [_TOOL.to_template()] if tools else None)
        except TemplateError:
            return None
        return text if all(part in text for part in wanted) else None

    has_variable = find([_USER], "probe_tool", tools=True) is not None
    described = json.dumps([_TOOL.to_template()["function"]])
    system = {"role": "system", "content": "probe_system"}
    has_system = find([system, _USER], "probe_system") is not None
    in_message = find([{**system, "tools": described}, _USER], "probe_tool") is not None
    tools: Literal["variable", "message"] | None = "message" if in_message else None
    if has_variable:
        tools = "variable"

    def ask(content: str | None, kind: str, *values: str) -> dict[str, Any]:
        """Return a message with a call for each value."""
        calls = []
        for value in values:
            arguments: Any = {_KEY: value}
            if kind == "text":
                arguments = json.dumps(arguments)
            function = {"name": "probe_tool", "arguments": arguments}
            calls.append({"id": _ID, "type": "function", "function": function})
        return {"role": "assistant", "content": content, "tool_calls": calls}

    for content in ("", None):
        for kind in ("object", "text"):
            asked = ask(content, kind, "probe_value")
            told = {"role": "tool", "content": "probe_result", "tool_call_id": _ID}
            told["name"] = "probe_tool"
            for results in (True, False):
                messages = [_USER, asked, told] if results else [_USER, asked]
                wanted = ("probe_result",) if results else ()
                text = find(messages, "probe_tool", "probe_value", *wanted)
                # As text within text, or in Python's words, it would teach the model to write so.
                if text and '\\"probe' not in text and "'probe" not in text:
                    form: Any = kind
                    two = [_USER, ask(content, kind, "probe_value", "probe_other")]
                    has_two = find(two, "probe_value", "probe_other") is not None
                    return Abilities(tools, form, content, results, has_system, has_two)
    return Abilities(tools, system=has_system)


def _are_messages(messages: object) -> bool:
    return isinstance(messages, list | tuple) and all(
        isinstance(message, Mapping) for message in messages
    )


def _is_about_tools(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def _read_calls(message: Mapping[str, Any], number: int) -> list[tuple[str | None, WrittenCall]]:
    calls = []
    for place, call in enumerate(message.get("tool_calls") or ()):
        where = f"messages[{number}].tool_calls[{place}].function.arguments"
        function = call["function"]
        checked = check_object(function["arguments"] or "{}")
        if checked is None:
            raise RequestError(
                f"{where} is {function['arguments']!r:.80}; it must be the text of a JSON object",
                where,
            )
        calls.append((call.get("id"), WrittenCall(str(function["name"]), checked)))
    return calls


def _read_whole(digits: str) -> int | float:
    # Python reads no longer ones, to keep the time bounded.
    return int(digits) if len(digits) <= 4300 else float(digits)


def _with_calls_apart(
    messages: Messages, bare: set[int], content: str | None
) -> tuple[Messages, set[int]]:
    """Return messages with one call each, its result after it; and the numbers of bare ones.

    content: that of a message which only calls, as in `Abilities`.
    """
    apart: Messages = []
    still_bare: set[int] = set()
    end = 0
    for number, message in enumerate(messages):
        if number < end:
            continue
        if number in bare:
            still_bare.add(len(apart))
        calls: list[Any] = message.get("tool_calls") or []
        if len(calls) < 2:
            apart.append(message)
            continue
        first, *more = calls
        told = itertools.takewhile(lambda one: one.get("role") == "tool", messages[number + 1 :])
        results = list(told)
        end = number + 1 + len(results)
        apart.append({**message, "tool_calls": [first]})
        _move_result_of(first, results, apart)
        for call in more:
            if content is None:
                still_bare.add(len(apart))
            apart.append({"role": message["role"], "content": "", "tool_calls": [call]})
            _move_result_of(call, results, apart)
        apart += results
    return apart, still_bare


def _move_result_of(call: Mapping[str, Any], results: Messages, to: Messages) -> None:
    for place, result in enumerate(results):
        if result.get("tool_call_id") == call.get("id"):
            to.append(results.pop(place))
            return


def _place_in_system(messages: Messages, text: str = "", tools: str | None = None) -> int:
    """Put text or tools into the system message; return how many messages were put before."""
    has_system = bool(messages) and messages[0].get("role") == "system"
    first = dict(messages[0]) if has_system else {"role": "system", "content": ""}
    if text:
        first["content"] = _joined(first["content"], text)
    if tools is not None:
        first["tools"] = tools
    messages[: 1 if has_system else 0] = [first]
    return 0 if has_system else 1


def _place_in_user(messages: Messages, text: str) -> None:
    """Put text before what the user says first."""
    for number, message in enumerate(messages):
        if message.get("role") == "user":
            content = message["content"]
            if isinstance(content, str):
                content = _joined(text, content)
            else:
                content = [{"type": "text", "text": f"{text}\n\n"}, *content]
            messages[number] = {**message, "content": content}
            return
    messages.insert(0, {"role": "user", "content": text})


def _joined(first: Any, second: str) -> Any:
    if isinstance(first, list):
        return [*first, {"type": "text", "text": f"\n\n{second}"}]
    return f"{first}\n\n{second}" if first else second


def _shift(numbers: set[int], by: int) -> set[int]:
    return {number + by for number in numbers}
