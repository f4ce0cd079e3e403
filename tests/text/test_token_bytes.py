"""Single tokens as bytes, in both ways of spelling them."""

from __future__ import annotations

from pathlib import Path

from small_tokenizers import write_tokenizer

from mlc_llm.text.token_bytes import TokenBytes
from mlc_llm.text.tokenizer import Tokenizer

TEXT = "Once upon a time \N{LION FACE} sl\N{LATIN SMALL LETTER E WITH ACUTE}pt."


def test_bytes_of_sentencepiece_tokens_join_to_the_text(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    token_bytes = TokenBytes(tokenizer)
    parts = [token_bytes.bytes_of(token) for token in tokenizer.encode(TEXT)]
    # The tokenizer puts a space before a text.
    assert b"".join(parts).decode() == " " + TEXT
    assert b"\xf0" in parts
    assert token_bytes.bytes_of(tokenizer.encode("\N{LION FACE}")[-1]) == b"\x81"


def test_bytes_of_byte_level_tokens_join_to_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    token_bytes = TokenBytes(tokenizer)
    parts = [token_bytes.bytes_of(token) for token in tokenizer.encode(TEXT)]
    assert b"".join(parts).decode() == TEXT


def test_added_tokens_are_their_text_and_unknown_ids_nothing(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.bytes_of(1) == b"<s>"
    assert token_bytes.bytes_of(-1) == token_bytes.bytes_of(10**6) == b""
