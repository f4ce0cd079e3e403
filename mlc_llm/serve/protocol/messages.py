"""The messages of a chat request, and what of them a chat template gets to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import RequestBody

MAX_MESSAGES = 4096
_MAX_PARTS = 4096
_MAX_CALLS = 128


class ContentPart(RequestBody):
    """A part of a message's content: of type "text" or, for models that see, "image_url"."""

    type: StrictStr
    text: StrictStr | None = None
    # So that other types are refused by what they are, and not by their fields.
    image_url: Any = None
    input_audio: Any = None
    audio_url: Any = None
    video_url: Any = None
    file: Any = None
    refusal: Any = None
    # Hints to caches of other servers, without effect.
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class CalledFunction(RequestBody):
    """A function that the model called, its arguments as JSON text."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(RequestBody):
    """A call of a tool in an earlier answer."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(RequestBody):
    """A message as clients send it, earlier answers of the model included.

    annotations of earlier answers have no effect. reasoning_content reaches templates that know it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[ContentPart], Field(max_length=_MAX_PARTS)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MAX_CALLS)] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    refusal: StrictStr | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages for `PromptBuilder`, contents as text unless they have other parts.

    Raises RequestError that names the place of what is not supported or out of place.
    """
    return [_read(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _read(message: Message, where: str) -> dict[str, Any]:
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            advice = "use tool_calls" if name == "function_call" else "send text"
            raise RequestError(f"{where}.{name} is not supported; {advice}", f"{where}.{name}")
    for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and message.role != role:
            raise RequestError(
                f"{where}.{name} belongs to messages of role {role!r}, not {message.role!r}",
                f"{where}.{name}",
            )
    # The role `developer` is what OpenAI calls `system` now; models know the old name.
    role = "system" if message.role == "developer" else message.role
    read: dict[str, Any] = {"role": role, "content": _read_content(message, where)}
    if message.tool_calls:
        read["tool_calls"] = [_plain(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            read[name] = value
    return read


def _plain(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(exclude_none=True)


def _read_content(message: Message, where: str) -> str | list[dict[str, Any]]:
    content = message.content
    if isinstance(content, str):
        return content
    if not content:
        # An answer may have been nothing but calls, or a refusal.
        if message.role == "assistant" and (message.tool_calls or message.refusal is not None):
            return message.refusal or ""
        raise RequestError(
            f"{where}.content is missing; it must be a text or a list of parts", f"{where}.content"
        )
    parts = [_read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    # Whether there is a place for an image depends on the model.
    return "".join(texts) if len(texts) == len(parts) else parts


def _read_part(part: ContentPart, where: str) -> dict[str, Any]:
    if part.type == "image_url":
        return {"type": part.type, "image_url": part.image_url}
    if part.type != "text":
        raise RequestError(
            f"{where} has type {part.type[:80]!r}; parts are of type 'text' or, for models that "
            "see, 'image_url'",
            f"{where}.type",
        )
    if part.text is None:
        raise RequestError(f"{where}.text is missing", f"{where}.text")
    return {"type": "text", "text": part.text}
