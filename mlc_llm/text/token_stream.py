"""Text of a growing sequence of ids, in pieces that end between characters.

The pieces joined are the decoding of all ids; what was spoken is never taken back. Bounded time and
memory per id, on any ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from mlc_llm.text.vocabulary import Vocabulary

# A character has at most 4 bytes, so after this many tokens an unfinished one never completes.
_MAX_HELD_TOKENS = 16
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenStream(Protocol):
    """Takes ids one by one, returns text."""

    def put(self, token_id: int) -> str:
        """Take the next id; return the text it completes, which may be "" or come from several."""

    def finish(self) -> str:
        """Return what is held back, an unfinished character as a replacement character."""


def open_stream(
    vocabulary: Vocabulary,
    skip_special_tokens: bool,
    context: Sequence[int],
    shown: Collection[int] = (),
) -> TokenStream:
    """Return a stream for ids that are in the vocabulary, as are those of `context` before them.

    shown: special tokens that are not skipped.
    """
    skipped = vocabulary.special_ids.difference(shown) if skip_special_tokens else frozenset[int]()
    kind = _ByteStream if vocabulary.decodes_bytes else _TextStream
    return kind(vocabulary, skipped, context[-_MAX_HELD_TOKENS:])


def decode_bytes(vocabulary: Vocabulary, ids: Iterable[int], skip_special_tokens: bool) -> str:
    """Return the text of ids by their bytes; those that are no characters are marked as such."""
    kept = (n for n in ids if not (skip_special_tokens and n in vocabulary.special_ids))
    content = b"".join(vocabulary.bytes_of(token_id) for token_id in kept)
    if vocabulary.drops_first_space:
        content = content.removeprefix(b" ")
    return content.decode("utf-8", "replace")


class _ByteStream:
    """Joins the bytes of tokens."""

    def __init__(
        self, vocabulary: Vocabulary, skipped: frozenset[int], context: Sequence[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The context may end inside a character; it also tells whether the text begins here.
        self._drops_space = vocabulary.drops_first_space
        for token_id in context:
            self.put(token_id)

    def put(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        content = self._vocabulary.bytes_of(token_id)
        if self._drops_space and content:
            self._drops_space = False
            content = content.removeprefix(b" ")
        return self._decoder.decode(content)

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _TextStream:
    """Decodes the last ids again with each new one, for decoders that look at the tokens around.

    `tokenizers.decoders.DecodeStream` does the same for well-formed text, but raises on byte
    sequences a model may produce and holds them unbounded.
    """

    def __init__(
        self, vocabulary: Vocabulary, skipped: frozenset[int], context: Sequence[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        # ids: ... spoken earlier ... | _context, the last piece | _held, not yet spoken
        # The context is decoded again with each id, since a decoder treats the first id its own
        # way (drops its space).
        self._context = list(context)
        self._spoken = self._decode(self._context) if self._context else ""  # text of _context
        self._held: list[int] = []

    def put(self, token_id: int) -> str:
        self._held.append(token_id)
        piece = self._held_text()
        if len(self._held) < _MAX_HELD_TOKENS and (not piece or piece.endswith(_REPLACEMENT)):
            return ""
        if piece:
            self._context = self._held
            self._spoken = self._decode(self._context)
        self._held = []
        return piece

    def finish(self) -> str:
        piece = self._held_text()
        self._held = []
        return piece

    def _held_text(self) -> str:
        return self._decode([*self._context, *self._held])[len(self._spoken) :]

    def _decode(self, ids: Sequence[int]) -> str:
        kept = [token_id for token_id in ids if token_id not in self._skipped]
        return self._vocabulary.decode(kept, False)
