"""A model's vocabulary as llguidance reads it: bytes of tokens, and text to tokens without changes.

Knows every kind of tokenizer we read through `Tokenizer` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer

from mlc_llm.errors import RequestError
from mlc_llm.text.tokenizer import Tokenizer

_END = b"<|end of grammar|>"
# Put before a text so that a tokenizer cannot add a space to it.
_ANCHOR = "\n"


class GrammarVocabulary:
    """The tokens a grammar chooses from; `end_id`, one behind the last, says that a text may end.

    Stop tokens and special tokens are no text, so that only grammars which name them allow them.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_token_ids: Iterable[int], vocab_size: int
    ) -> None:
        """vocab_size: tokens that the model knows; ids from there on are not looked at.

        Raises RequestError for tokenizers whose tokens, joined, are not the text.
        """
        if not tokenizer.vocabulary.decodes_bytes:
            raise RequestError(
                "this model's tokenizer changes the text it makes of tokens, so answers cannot be "
                "held to a grammar; leave response_format out",
                "response_format",
            )
        self.drops_first_space = tokenizer.vocabulary.drops_first_space
        self.end_id = vocab_size
        self.size = vocab_size + 1
        self._tokenizer = tokenizer
        special = {*tokenizer.vocabulary.special_ids, *stop_token_ids}
        self._special_ids = {token for token in special if 0 <= token < vocab_size}
        self.special_ids_by_text = {
            text: token
            for token in sorted(self._special_ids, reverse=True)
            if (text := tokenizer.bytes_of(token).decode("utf-8", "replace"))
        }
        known = min(tokenizer.vocab_size, vocab_size)
        self._bytes = [tokenizer.bytes_of(token) for token in range(known)]
        self._bytes += [b""] * (vocab_size - known)
        wrapper: Any = _Wrapper(self, [*self._bytes, _END])
        self.inner = LLTokenizer(wrapper, eos_token=[self.end_id])

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token; special ones have those of their spelling."""
        return self._bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        """Say whether only grammars that name a token allow it."""
        return token_id in self._special_ids

    def encode(self, text: str) -> list[int]:
        """Return tokens whose bytes are exactly the text's, special ones left out."""
        wanted = text.encode()
        ids = self._tokenizer.encode(text)
        if self._is_exact(ids, wanted):
            return ids
        anchor = _ANCHOR.encode()
        ids, passed = self._tokenizer.encode(_ANCHOR + text), b""
        for place, token in enumerate(ids):
            passed += self._bytes[token] if token < len(self._bytes) else b""
            if passed.lstrip(b" ") == anchor and self._is_exact(ids[place + 1 :], wanted):
                return ids[place + 1 :]
            if len(passed) > 2 * len(anchor):
                break
        return self._longest_matches(wanted)

    def split_special(self, text: str) -> list[str]:
        """Return the pieces of a text: spellings of special tokens, and what is between them."""
        return [piece for piece in self._special_spelling.split(text) if piece]

    def encode_marked(self, text: str) -> list[int]:
        """Return tokens of a text, in which spellings of special tokens stand for those."""
        ids: list[int] = []
        for piece in self.split_special(text):
            special = self.special_ids_by_text.get(piece)
            ids += self.encode(piece) if special is None else [special]
        return ids

    def ids_that_begin(self, text: str) -> list[int]:
        """Return the tokens, other than special ones, that a text may begin with."""
        wanted = text.encode()
        found = (self._ids_by_bytes.get(wanted[:end]) for end in range(1, len(wanted) + 1))
        return [token for token in found if token is not None]

    @cached_property
    def _special_spelling(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids_by_text, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def _is_exact(self, ids: list[int], wanted: bytes) -> bool:
        if any(token in self._special_ids or token >= len(self._bytes) for token in ids):
            return False
        return b"".join([self._bytes[token] for token in ids]) == wanted

    def _longest_matches(self, wanted: bytes) -> list[int]:
        """Return the tokens of bytes, always the longest that fits; stop where none does."""
        ids, at = [], 0
        while at < len(wanted):
            for end in range(min(len(wanted), at + self._max_token_len), at, -1):
                token = self._ids_by_bytes.get(wanted[at:end])
                if token is not None:
                    ids.append(token)
                    at = end
                    break
            else:
                break
        return ids

    @cached_property
    def _ids_by_bytes(self) -> dict[bytes, int]:
        plain = (item for item in enumerate(self._bytes) if item[0] not in self._special_ids)
        return {content: token for token, content in plain if content}

    @cached_property
    def _max_token_len(self) -> int:
        return max(map(len, self._ids_by_bytes), default=0)


class _Wrapper:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary, tokens: list[bytes]) -> None:
        self.eos_token_id = vocabulary.end_id
        self.tokens = tokens
        self.special_token_ids = sorted(
            {*vocabulary.special_ids_by_text.values(), vocabulary.end_id}
        )
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text."""
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
