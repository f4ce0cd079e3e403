"""The bytes that single tokens stand for, also where they are no whole characters."""

from __future__ import annotations

from mlc_llm.text.tokenizer import Tokenizer


class TokenBytes:
    """Tells the bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token, b"" for an id that the vocabulary does not have."""
        return self._tokenizer.bytes_of(token_id)

    def text_of(self, token_id: int) -> str:
        """Return the token as text; bytes that are no characters show as replacement characters."""
        return self.bytes_of(token_id).decode("utf-8", "replace")
