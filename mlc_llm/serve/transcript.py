"""A conversation as the messages of a chat, written turn by turn.

Protocols that know no messages but items and blocks are translated with it. What they hold between
two messages of the user becomes one message of the assistant, as chat templates expect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from mlc_llm.errors import RequestError
from mlc_llm.serve.errors import field_error
from mlc_llm.serve.protocol.chat import ChatCompletionRequest

# What fields of a chat are called in another protocol.
Names = Sequence[tuple[re.Pattern[str], str]]
Message = dict[str, Any]


class Transcript:
    """Messages in the shape of chat requests."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def say(self, role: str, content: Any) -> None:
        """Add a message of the system or the user."""
        self.messages.append({"role": role, "content": content})

    def give_result(self, call_id: str, content: Any) -> None:
        """Add what a call has returned."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def answer(self, text: str) -> None:
        """Let the assistant say something, beside calls that it has made since the last message."""
        message = self._open_answer()
        if message["content"] is not None:
            if message.get("tool_calls"):
                text = f"{message['content']}\n\n{text}"
            else:
                message = self._begin_answer()
        message["content"] = text

    def think(self, text: str) -> None:
        """Let the assistant think, before it answers or calls."""
        message = self._open_answer()
        if message["content"] is not None and not message.get("tool_calls"):
            message = self._begin_answer()
        earlier = message.get("reasoning_content")
        message["reasoning_content"] = text if earlier is None else f"{earlier}\n{text}"

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """Let the assistant call a function; arguments are JSON text."""
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._open_answer().setdefault("tool_calls", []).append(call)

    def _open_answer(self) -> Message:
        is_open = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        return self.messages[-1] if is_open else self._begin_answer()

    def _begin_answer(self) -> Message:
        message: Message = {"role": "assistant", "content": None}
        self.messages.append(message)
        return message


def read_chat_request(fields: dict[str, Any]) -> ChatCompletionRequest:
    """Return the chat request of these fields; those that are None are left out.

    Raises RequestError for what chats do not take.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise field_error(error, fields) from None


@contextmanager
def renamed_fields(names: Names) -> Iterator[None]:
    """Let errors of a chat request name the fields that its protocol has for them."""
    try:
        yield
    except RequestError as error:
        place = error.param
        for pattern, name in names:
            if place is not None and (match := pattern.match(place)):
                error.param = match.expand(name) + place[match.end() :]
                error.args = (str(error).replace(place, error.param, 1), *error.args[1:])
                break
        raise
