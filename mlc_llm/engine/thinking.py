"""Counts the tokens of a model's thoughts and says when they must end.

Knows the text of tokens and the marks of thoughts; what forces the end is in grammar_masks.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.grammar import ThoughtLimit
from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary


@dataclass(frozen=True)
class CompiledLimit:
    """A limit in the bytes and tokens of a vocabulary.

    closing: the tokens that end thoughts. barred: those with which more thoughts would begin after
    the lead, which other parts begin with as well.
    """

    max_tokens: int
    is_open: bool
    recurs: bool
    lead: bytes
    begin: bytes
    ends: tuple[bytes, ...]
    closing: tuple[int, ...]
    barred: NDArray[np.int64]

    @classmethod
    def of(cls, limit: ThoughtLimit, vocabulary: GrammarVocabulary) -> CompiledLimit:
        """Read a limit. Raises RequestError where no tokens are the end of thoughts."""
        marks = limit.marks
        closing = vocabulary.encode_marked(marks.closing)
        if b"".join(map(vocabulary.bytes_of, closing)) != marks.closing.encode():
            raise RequestError(
                f"this model has no tokens for {marks.closing!r}, which would end its thoughts; "
                "ask without a budget for them",
                "thinking_token_budget",
            )
        barred = vocabulary.ids_that_begin(marks.begin) if marks.recurs else []
        return cls(
            limit.max_tokens,
            limit.is_open,
            marks.recurs,
            marks.lead.encode(),
            (marks.lead + marks.begin).encode(),
            tuple(end.encode() for end in marks.ends),
            tuple(closing),
            np.asarray(barred, np.int64),
        )


class ThoughtCounter:
    """The thoughts of one sequence.

    is_over: there will be no more of them, so that nothing is left to count.
    """

    def __init__(self, limit: CompiledLimit, vocabulary: GrammarVocabulary) -> None:
        self.limit = limit
        self.is_over = False
        self._bytes_of = vocabulary.bytes_of
        self._is_inside = limit.is_open
        self._num_left = limit.max_tokens
        # The end of the text, as much as a mark may have begun in.
        self._tail = b""
        self._kept = max(map(len, (limit.begin, *limit.ends)))

    @property
    def must_end(self) -> bool:
        """Return whether the sequence is inside of thoughts and may have no more of them."""
        return self._is_inside and self._num_left <= 0

    @property
    def barred(self) -> NDArray[np.int64] | None:
        """The tokens that must not come next, since more thoughts would begin with them."""
        is_spent = self._num_left <= 0 and not self._is_inside and len(self.limit.barred) > 0
        return self.limit.barred if is_spent and self._tail.endswith(self.limit.lead) else None

    def append(self, token_id: int) -> None:
        """Take note of a token of the text."""
        self._tail += self._bytes_of(token_id)
        if self._is_inside:
            self._look_for_end()
        else:
            self._look_for_begin()
        if self._is_inside or self.limit.recurs:
            self._tail = self._tail[-self._kept :]

    def _look_for_end(self) -> None:
        found = [place for end in self.limit.ends if (place := self._tail.find(end)) >= 0]
        if not found:
            self._num_left -= 1
            return
        self._is_inside = False
        self.is_over = not self.limit.recurs
        # What ends thoughts may begin others.
        self._tail = self._tail[min(found) :]

    def _look_for_begin(self) -> None:
        begin = self.limit.begin
        if self.limit.recurs:
            place = self._tail.find(begin)
            self._is_inside = place >= 0
        else:
            self._tail = self._tail.lstrip()
            place = 0
            self._is_inside = self._tail.startswith(begin)
            self.is_over = not self._is_inside and not begin.startswith(self._tail)
        if self._is_inside:
            self._tail = self._tail[place + len(begin) :]
