"""From what a request says of a grammar to a matcher that can be started any number of times.

Slow and hostile grammars are read by a helper process first; here is only read what passed there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from llguidance import LLMatcher

from mlc_llm.errors import RequestError
from mlc_llm.text.child_process import ChildError, ChildOverdue, ChildProcess
from mlc_llm.text.grammars.limits import (
    CLOCK_LIMIT_S,
    END_ID,
    MEMORY_LIMIT_BYTES,
    TIME_LIMIT_S,
    parser_limits,
)
from mlc_llm.text.grammars.schema import PARAM
from mlc_llm.text.grammars.source import join_parts, read_source
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary

_WORKER_PATH = Path(__file__).with_name("worker.py")
_MAX_REASON = 300
_TOKEN_ID = re.compile(r"<\[[0-9]{1,10}\]>")


class GrammarReader:
    """Reads grammars for one vocabulary; safe to call from several threads."""

    def __init__(self, make_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        """make_vocabulary is called once, by whoever needs it first: it takes up to a second."""
        self._make_vocabulary = make_vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._lock = threading.Lock()
        self.cpu_s = 0.0  # processor time that reading has taken so far
        self._child = ChildProcess(_WORKER_PATH, ("llguidance",), MEMORY_LIMIT_BYTES)

    @property
    def vocabulary(self) -> GrammarVocabulary:
        """The vocabulary. Raises RequestError where the tokenizer allows no grammars."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary

    def start(self) -> None:
        """Make ready what the first grammar would otherwise wait for."""
        try:
            self._child.start()
            self.vocabulary  # noqa: B018
        except (ChildError, RequestError):
            return  # the first request that needs it is told why

    @property
    def is_ready(self) -> bool:
        """Return whether the vocabulary is there."""
        return self._vocabulary is not None

    def read(
        self, kind: str, source: str, continues_text: bool, has_gap: bool = False
    ) -> LLMatcher:
        """Return a matcher before its first token; see `GrammarSpec` for the arguments.

        has_gap: up to two line breaks may come before the text.

        Takes at most some seconds. Raises RequestError for what is wrong, unsupported or too much.
        """
        vocabulary = self.vocabulary
        parts = read_source(kind, source, vocabulary)
        if kind == "ebnf":
            parts[0]["lark_grammar"] = self._try(source, is_ebnf=True)
        has_first_space = vocabulary.drops_first_space and not continues_text
        grammar = join_parts(parts, has_first_space=has_first_space, has_gap=has_gap)
        self._try(grammar, is_ebnf=False)
        matcher = LLMatcher(vocabulary.inner, grammar, log_level=0, limits=parser_limits())
        _check_first_token(matcher, vocabulary)
        return matcher

    def close(self) -> None:
        """End the helper process."""
        self._child.close()

    def _try(self, grammar: str, is_ebnf: bool) -> str:
        """Let the helper process read a grammar; return what it became. Raises RequestError."""
        # It has another vocabulary, of which the end alone is special.
        tried = grammar if is_ebnf else _TOKEN_ID.sub(f"<[{END_ID}]>", grammar)
        try:
            request = {"grammar": tried, "is_ebnf": is_ebnf}
            reply = self._child.ask(request, CLOCK_LIMIT_S, TIME_LIMIT_S)
        except ChildOverdue:
            raise RequestError(
                "the grammar takes too long to read; make it simpler", PARAM
            ) from None
        except ChildError:
            raise RequestError(
                "the grammar is nested too deeply or takes too much memory; make it simpler", PARAM
            ) from None
        self.cpu_s += float(reply["cpu_s"])
        if "error" in reply:
            raise _bad_grammar(str(reply["error"]))
        return str(reply.get("lark", grammar))


def _check_first_token(matcher: LLMatcher, vocabulary: GrammarVocabulary) -> None:
    if matcher.is_error():
        raise _bad_grammar(matcher.get_error())
    first = matcher.deep_copy()
    words = np.zeros(-(-vocabulary.size // 32), np.uint32)
    first.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    end_word, end_bit = divmod(vocabulary.end_id, 32)
    words[end_word] &= ~np.uint32(1 << end_bit)
    if not words.any():
        reason = first.get_error() if first.is_error() else "it allows no text, or the empty one"
        raise _bad_grammar(reason)


def _bad_grammar(reason: str) -> RequestError:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("<")] or ["it allows no text"]
    text = " ".join(lines)
    if "panic" in text:
        text = "it is too large"
    if text.startswith("NoExtension"):
        text = "it allows no text"
    return RequestError(f"the grammar cannot be used: {text[:_MAX_REASON]}", PARAM)
