"""What a tokenizer is made of, and the kind that the `tokenizers` package runs.

Knows ids, spellings and bytes of tokens. Does not know files or settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from mlc_llm.text.formats.byte_level import byte_of_character
from mlc_llm.text.formats.content import SPACE_MARK, no_panics

TOKENIZER_NAME = "tokenizer.json"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Characters from which a text is worth the overhead of a batch.
_LONG_TEXT = 4096
# Decoder steps under which a token's bytes do not depend on the tokens around it.
_SPACES = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_BYTE_STEPS = ({"type": "ByteFallback"}, {"type": "Fuse"}, _SPACES, _STRIP)


class Vocabulary(Protocol):
    """Tokens, and text to ids and back."""

    @property
    def size(self) -> int:
        """One more than the highest id."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of tokens that are no text."""

    @property
    def decodes_bytes(self) -> bool:
        """Whether the bytes of the tokens, joined, are the text; it is not so with WordPiece."""

    @property
    def drops_first_space(self) -> bool:
        """Whether a space before the whole text is no part of it."""

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], int]:
        """Return the ids, and how many special ones were put behind those of the text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of ids, all of which are there."""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""

    def spelling_of(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, or None for an unknown id."""

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token that is there."""

    def to_file(self) -> tuple[str, bytes]:
        """Return name and content of the one file it can be read from again."""


class HuggingFaceVocabulary:
    """A vocabulary of the `tokenizers` package; see `Vocabulary` for the methods."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Take over `inner`."""
        # A stored limit or padding is meant for training batches; a prompt is taken as it is.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        decoder = inner.decoder
        content = None if decoder is None else json.loads(decoder.__getstate__())
        steps = list(each_step(content, "decoders"))
        self.is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        self.decodes_bytes = (self.is_byte_level and len(steps) == 1) or _joins_bytes(steps)
        self.drops_first_space = _STRIP in steps
        added = inner.get_added_tokens_decoder()
        self._highest_added = max(added, default=-1)
        self.special_ids = frozenset(n for n, token in added.items() if token.special)

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self._inner.get_vocab_size(), self._highest_added + 1)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], int]:
        """Return the ids, and how many special ones were put behind those of the text."""
        with no_panics("the tokenizer"):
            if len(text) < _LONG_TEXT:
                encoding = self._inner.encode(text, add_special_tokens=add_special_tokens)
            else:
                # Unlike encode, lets other threads run meanwhile: megabytes take seconds.
                batch = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                encoding = batch[0]
        num_added = 0
        if add_special_tokens:
            mask = encoding.special_tokens_mask
            while num_added < len(mask) and mask[-1 - num_added]:
                num_added += 1
        return encoding.ids, num_added

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of ids, all of which are there."""
        with no_panics("the tokenizer"):
            return str(self._inner.decode(ids, skip_special_tokens=skip_special_tokens))

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        token_id: int | None = self._inner.token_to_id(token)
        return token_id

    def spelling_of(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, or None for an unknown id."""
        token: str | None = self._inner.id_to_token(token_id)
        return token

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token that is there."""
        token = self._inner.id_to_token(token_id)
        assert token is not None, token_id
        if self.is_byte_level:
            codes = [byte_of_character().get(character) for character in token]
            if None not in codes:
                return bytes(code for code in codes if code is not None)
            return token.encode()  # added tokens are plain text
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(SPACE_MARK, " ").encode()

    def to_file(self) -> tuple[str, bytes]:
        """Return name and content of the one file it can be read from again."""
        return TOKENIZER_NAME, str(self._inner.to_str()).encode()


def each_step(step: Any, children: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder or normalizer, those inside a Sequence one by one."""
    if not isinstance(step, Mapping):
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for child in step.get(children) or []:
        yield from each_step(child, children)


def _joins_bytes(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a decoder only joins what tokens stand for, a space before it left out."""
    if not all(step in _BYTE_STEPS for step in steps):
        return False
    kinds = [step["type"] for step in steps]
    # Without Fuse, a space would be left out before every token.
    return "ByteFallback" in kinds and ("Strip" not in kinds or "Fuse" in kinds)
