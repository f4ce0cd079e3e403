"""Stop strings in streamed text: find them early, show nothing of them.

Knows characters only; stop tokens are the engine's affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopFilter:
    """Passes text on until one of the stop strings begins.

    Holds back the longest end of the text that could still become a stop string, and no more.
    The work is linear in the text, whatever the stop strings (Aho and Corasick 1975, Alg. 1-3).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.matched: str | None = None
        # A state is a prefix of a stop string; state 0 is the empty one.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # characters in the prefix
        self._match = [0]  # length of the longest stop string the prefix ends with, or 0
        for text in stop:
            self._add(text)
        self._fallback = self._link()
        self._state = 0
        self._held: deque[str] = deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come, which is then `matched`."""
        return self.matched is not None

    def put(self, text: str) -> str:
        """Take the next piece of text; return what is now known to be no part of a stop string."""
        safe: list[str] = []
        for character in text:
            if self.stopped:
                break
            self._state = self._step(self._state, character)
            self._held.append(character)
            if self._match[self._state]:
                keep = self._match[self._state]
            else:
                keep = self._depth[self._state]
            while len(self._held) > keep:
                safe.append(self._held.popleft())
            if self._match[self._state]:
                self.matched = "".join(self._held)
        return "".join(safe)

    def finish(self) -> str:
        """Return what is held back, now that no more text comes; "" after a stop string."""
        rest = "" if self.stopped else "".join(self._held)
        self._held.clear()
        return rest

    def _add(self, text: str) -> None:
        state = 0
        for character in text:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(text)

    def _link(self) -> list[int]:
        """Return for each state the longest proper end of it that is a state too."""
        self._fallback = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            self._match[state] = self._match[state] or self._match[fallback]
            for character, child in self._next[state].items():
                self._fallback[child] = self._step(fallback, character)
                queue.append(child)
        return self._fallback

    def _step(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][character]
