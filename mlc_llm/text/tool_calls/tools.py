"""What a model may call: tools, and how much choice it has. Knows no protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Tool:
    """A function: its name, what it does, and the JSON schema of its arguments.

    strict: calls must keep to the schema, whatever the choice.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of the arguments; a function without one takes none."""
        return NO_PARAMETERS if self.parameters is None else self.parameters

    def to_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it, which is OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.schema)
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    choice: auto lets the model choose between text and calls, required asks for at least one call,
    none forbids them. name: the one tool that is to be called. parallel: an answer may have
    several calls.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that an answer may call."""
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.name in (None, tool.name))

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """The schemas of what an answer may call, by name."""
        return {tool.name: tool.schema for tool in self.callable_tools}


@dataclass(frozen=True)
class WrittenCall:
    """A call of an earlier answer; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallShape:
    """How calls are written, as texts around names and arguments; special tokens are among them.

    trigger: the beginning of `open + begin` at which a free answer turns into calls; "" where only
    the whole answer can be calls.
    special: texts that are tokens of their own in the vocabularies of such models.
    """

    begin: str
    middle: str
    end: str
    open: str = ""
    close: str = ""
    separator: str = "\n"
    trigger: str = ""
    special: tuple[str, ...] = field(default=())

    def write(self, calls: list[WrittenCall]) -> str:
        """Return calls as a model would have written them."""
        written = (
            self.begin + call.name + self.middle + call.arguments + self.end for call in calls
        )
        return self.open + self.separator.join(written) + self.close
