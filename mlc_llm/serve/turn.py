"""One turn of the assistant as events of `text/events.py`: what agent protocols are written from.

A turn is asked for as a chat request. Knows no protocol's answers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from mlc_llm.serve.chat import start_chat, usage_of
from mlc_llm.serve.chat_answer import events_of
from mlc_llm.serve.generation import Generation, Piece
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.chat import ChatCompletionRequest
from mlc_llm.serve.protocol.usage import Usage
from mlc_llm.serve.transcript import Names, renamed_fields
from mlc_llm.text.events import Event, join_events

TurnEnd = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class TurnPiece:
    """What arrived together, and maybe how the turn ended."""

    events: list[Event]
    end: TurnEnd | None = None


class Turn:
    """A turn that the engine is making; leaving its pieces aborts it."""

    def __init__(
        self, model: ServedModel, generation: Generation, max_tokens: int | None, names: Names = ()
    ) -> None:
        """names: what errors on the way call a chat's fields."""
        self._model = model
        self._generation = generation
        self._max_tokens = max_tokens
        self._names = names

    @classmethod
    async def start(
        cls, model: ServedModel, request: ChatCompletionRequest, request_id: str, names: Names
    ) -> Turn:
        """Queue a turn. Raises as `chat` does; errors call a chat's fields by their `names`."""
        with renamed_fields(names):
            generation = await start_chat(model, request, request_id)
        return cls(model, generation, request.max_new_tokens, names)

    @property
    def usage(self) -> Usage:
        """The tokens so far; which of the prompt were cached is known from the first piece on."""
        return usage_of(self._model, self._generation)

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the answer."""
        return self._generation.texts[0].stop_string

    async def pieces(self) -> AsyncGenerator[TurnPiece, None]:
        """Yield what arrives; leaving early, or any error, aborts the request."""
        with renamed_fields(self._names):
            async with aclosing(self._generation.pieces()) as arriving:
                async for pieces in arriving:
                    for piece in pieces:
                        yield TurnPiece(events_of(piece), self._end_of(piece))

    async def collect(self) -> tuple[list[Event], TurnEnd]:
        """Return the whole turn."""
        events: list[Event] = []
        end: TurnEnd = "stop"
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                events += piece.events
                end = piece.end or end
        return join_events(events), end

    def _end_of(self, piece: Piece) -> TurnEnd | None:
        if piece.finish_reason != "length":
            return piece.finish_reason
        is_full = (
            self._max_tokens is None or self._generation.num_completion_tokens < self._max_tokens
        )
        return "context" if is_full else "length"
