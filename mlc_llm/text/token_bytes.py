"""The bytes that single tokens stand for, also where they are no whole characters."""

from __future__ import annotations

import re

from mlc_llm.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: bytes that print stand for themselves, the others come from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printing}
    others = (byte for byte in range(256) if byte not in set(printing))
    table.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return table


class TokenBytes:
    """Tells the bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table = _byte_of_character() if tokenizer.is_byte_level else None

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token, b"" for an id that the vocabulary does not have."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._table is not None:
            codes = [self._table.get(character) for character in token]
            if None not in codes:
                return bytes(code for code in codes if code is not None)
        elif match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        # Added tokens are plain text in either kind.
        return token.replace(_SPACE_MARK, " ").encode("utf-8", "replace")

    def text_of(self, token_id: int) -> str:
        """Return the token as text; bytes that are no characters show as replacement characters."""
        return self.bytes_of(token_id).decode("utf-8", "replace")
