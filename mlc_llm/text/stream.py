"""Text of one sequence as its tokens come: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mlc_llm.text.stop import StopFilter
from mlc_llm.text.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text piece by piece.

    num_decoded and num_passed count characters: those that the tokens so far have made, and those
    that were returned. What lies between is held back, since it may become a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        min_tokens: int = 0,
        context: Sequence[int] = (),
        shown: Collection[int] = (),
    ) -> None:
        """Begin a text, one that continues the ids of `context` where there are any.

        In what the first min_tokens tokens bring, no stop string counts. shown: special tokens
        that are part of the text.
        """
        self.num_decoded = 0
        self.num_passed = 0
        self._tokens = tokenizer.stream(context=context, shown=shown)
        self._stops = StopFilter(stop) if stop else None
        self._num_free = min_tokens  # tokens whose text passes whatever it says

    @property
    def stopped(self) -> bool:
        """Return whether a stop string has come; nothing is returned after it."""
        return self._stops is not None and self._stops.stopped

    @property
    def matched(self) -> str | None:
        """The stop string that has come."""
        return None if self._stops is None else self._stops.matched

    def put(self, token_id: int) -> str:
        """Take a token; return the text that is now sure."""
        text = self._tokens.put(token_id)
        if self._num_free > 0:
            self._num_free -= 1
            self.num_decoded += len(text)
            self.num_passed += len(text)
            return text
        return self._pass(text)

    def finish(self) -> str:
        """Return what is held back, now that no token comes any more."""
        if self.stopped:
            return ""
        text = self._pass(self._tokens.finish())
        rest = "" if self._stops is None else self._stops.finish()
        self.num_passed += len(rest)
        return text + rest

    def _pass(self, text: str) -> str:
        self.num_decoded += len(text)
        passed = text if self._stops is None else self._stops.put(text)
        self.num_passed += len(passed)
        return passed
