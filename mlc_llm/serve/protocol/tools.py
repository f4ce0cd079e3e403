"""The tools of a request, and how much choice the model has between them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictStr

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import RequestBody
from mlc_llm.text.tool_calls.tools import Tool, ToolUse

MAX_TOOLS = 128
MAX_DESCRIPTION_LEN = 16_384  # characters
MAX_SCHEMA_DEPTH = 64
MAX_TOOLS_LEN = 256 * 1024  # characters of all tools as JSON

FunctionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(RequestBody):
    """A function that the model may call; parameters is the JSON schema of its arguments."""

    name: FunctionName
    description: Annotated[StrictStr, Field(max_length=MAX_DESCRIPTION_LEN)] | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class FunctionTool(RequestBody):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionChoice(RequestBody):
    """The name of the function to call."""

    name: FunctionName


class NamedChoice(RequestBody):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionChoice


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def read_tool_use(
    tools: Sequence[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolUse:
    """Return what a request says of tools. Raises RequestError that names the field at fault."""
    read = tuple(_read_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools or ()))
    seen: dict[str, int] = {}
    for place, tool in enumerate(read):
        if tool.name in seen:
            raise RequestError(
                f"tools[{place}] has the name {tool.name!r}, as tools[{seen[tool.name]}] has; give "
                "each tool its own",
                f"tools[{place}].function.name",
            )
        seen[tool.name] = place
    size = len(json.dumps([tool.to_template() for tool in read]))
    if size > MAX_TOOLS_LEN:
        raise RequestError(
            f"the tools have {size:,} characters as JSON, at most {MAX_TOOLS_LEN:,} may be", "tools"
        )
    name, mode = None, choice or "auto"
    if isinstance(mode, NamedChoice):
        name, mode = mode.function.name, "required"
        if name not in seen:
            raise RequestError(
                f"tool_choice names {name!r}, which is not among the tools", "tool_choice"
            )
    if mode == "required" and not read:
        raise RequestError("tool_choice 'required' needs tools; give at least one", "tool_choice")
    return ToolUse(read, mode, name, parallel is not False)


def _read_tool(tool: FunctionTool, where: str) -> Tool:
    function = tool.function
    if function.parameters is not None:
        _check_parameters(function.parameters, f"{where}.function.parameters")
    return Tool(
        function.name, function.description, function.parameters, strict=bool(function.strict)
    )


def _check_parameters(schema: Mapping[str, Any], where: str) -> None:
    if schema.get("type", "object") != "object":
        raise RequestError(
            f"{where}.type is {schema['type']!r:.80}; arguments are an object", f"{where}.type"
        )
    level: list[Any] = [schema]
    num_values = 0
    for _ in range(MAX_SCHEMA_DEPTH):
        items = itertools.chain.from_iterable(map(_items_of, level))
        level = list(itertools.islice(items, MAX_TOOLS_LEN))
        num_values += len(level)
        if 2 * num_values > MAX_TOOLS_LEN:  # each has a character, and another between them
            raise RequestError(f"{where} has more than {MAX_TOOLS_LEN // 2:,} values", where)
        if not level:
            return
    raise RequestError(f"{where} has more than {MAX_SCHEMA_DEPTH} levels", where)


def _items_of(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else ()


class AnswerFunction(BaseModel):
    """A function that the model calls, its arguments as JSON text."""

    name: str
    arguments: str


class AnswerCall(BaseModel):
    """A call of a tool in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction
