"""Compiled grammars of an engine: made in a thread of their own, kept while they are in use."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher

from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.thinking import CompiledLimit
from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.reader import GrammarReader
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary

_MAX_ENTRIES = 64
# Of sources: what is compiled of them takes some times more.
_MAX_SOURCE_CHARS = 4 << 20

_Key = tuple[str, str, bool, bool]


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar at its beginning; `matcher` is copied for each sequence and not used itself.

    matcher: None where any text will do. thoughts: None where they have no limit. read_s: seconds
    of processor time that reading it has taken now, none where it was known.
    """

    matcher: LLMatcher | None
    vocabulary: GrammarVocabulary
    starts_after: tuple[bytes, ...]
    thoughts: CompiledLimit | None
    read_s: float = 0.0


class GrammarCache:
    """Compiles grammars, one at a time, and keeps those that were used last; thread-safe.

    Grammars that were refused are kept as well, so that nobody can have them tried again and again.
    """

    def __init__(
        self, make_vocabulary: Callable[[], GrammarVocabulary], max_entries: int = _MAX_ENTRIES
    ) -> None:
        """make_vocabulary is called once, when it is needed or by `start`."""
        self._reader = GrammarReader(make_vocabulary)
        self._max_entries = max_entries
        self._entries: OrderedDict[_Key, LLMatcher | str] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Return how many grammars are kept."""
        return len(self._entries)

    def start(self) -> None:
        """Make ready, in the background, what the first grammar would otherwise wait for."""
        self._executor().submit(self._reader.start)

    async def compile_soon(self, spec: GrammarSpec) -> CompiledGrammar:
        """Return what `compile` does, without holding up the event loop.

        What is known already does not wait for others that are being compiled.
        """
        is_free = spec.kind == "text"
        if self._reader.is_ready if is_free else self._find(_key_of(spec)) is not None:
            return self.compile(spec)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor(), self.compile, spec)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Return a compiled grammar; takes some seconds at most.

        Raises RequestError for what is wrong with it, what is not supported and what is too much.
        """
        matcher, read_s = None, 0.0
        if spec.kind != "text":
            matcher, read_s = self._matcher_of(_key_of(spec))
        vocabulary = self._reader.vocabulary
        starts_after = tuple(text.encode() for text in spec.starts_after or () if text)
        thoughts = None if spec.thoughts is None else CompiledLimit.of(spec.thoughts, vocabulary)
        return CompiledGrammar(matcher, vocabulary, starts_after, thoughts, read_s)

    def close(self) -> None:
        """End the helper process and the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._reader.close()

    def _matcher_of(self, key: _Key) -> tuple[LLMatcher, float]:
        """Return a matcher, and the processor time of reading it now."""
        start_s = self._reader.cpu_s
        known = self._find(key)
        if known is None:
            known = self._read(key)
        if isinstance(known, str):
            raise RequestError(known, "response_format")
        return known, self._reader.cpu_s - start_s

    def _find(self, key: _Key) -> LLMatcher | str | None:
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
            return known

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "mlc_llm grammars")
            return self._thread

    def _read(self, key: _Key) -> LLMatcher | str:
        entry: LLMatcher | str
        try:
            entry = self._reader.read(*key)
        except RequestError as error:
            entry = str(error)
        num_chars = len(key[1])
        if num_chars > _MAX_SOURCE_CHARS:
            return entry
        with self._lock:
            if key not in self._entries:
                self._num_chars += num_chars
            self._entries[key] = entry
            while len(self._entries) > self._max_entries or self._num_chars > _MAX_SOURCE_CHARS:
                (_, source, *_), _ = self._entries.popitem(last=False)
                self._num_chars -= len(source)
        return entry


def _key_of(spec: GrammarSpec) -> _Key:
    """Return what makes a difference to what is compiled."""
    has_start = spec.starts_after is not None
    return (
        spec.kind,
        spec.source,
        spec.continues_text or has_start,
        has_start and spec.skips_lines,
    )
