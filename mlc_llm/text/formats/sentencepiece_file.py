"""Reads the file of a SentencePiece model: a protocol buffer, of which we need three messages.

Knows the numbers of its fields (sentencepiece_model.proto); not what they mean for text.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from mlc_llm.errors import CorruptFile

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class PieceType(IntEnum):
    """What a piece is for; the numbers are those of the file, and of GGUF files too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """The algorithm that cuts text into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float = 0.0
    type: PieceType = PieceType.NORMAL


@dataclass
class SentencePieceModel:
    """A model file, with the defaults of fields that are not in it."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: ModelType = ModelType.UNIGRAM
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    has_denormalizer: bool = False


class _Damaged(Exception):
    """The bytes are no protocol buffer."""


def looks_like_sentencepiece(content: bytes) -> bool:
    """Say whether a file begins with a piece, as every SentencePiece model does."""
    return content[:1] == b"\x0a" and not content[:2].isspace()


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model. Raises CorruptFile if it is damaged or something else."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_read_piece(value))
            elif number == 2 and isinstance(value, bytes):
                _read_trainer(value, model)
            elif number == 3 and isinstance(value, bytes):
                _read_normalizer(value, model)
            elif number == 5 and isinstance(value, bytes):
                model.has_denormalizer = any(n == 2 and v for n, v in _fields(value))
    except (_Damaged, ValueError) as error:
        raise CorruptFile(
            f"{path} is not a SentencePiece model ({error}); download the model again"
        ) from None
    if not model.pieces:
        raise CorruptFile(f"{path} holds no vocabulary; download the model again")
    return model


def _read_piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = PieceType(value)
    if score != score or score in (float("inf"), float("-inf")):
        raise _Damaged(f"piece {text[:40]!r} has score {score}")
    return Piece(text, score, kind)


def _read_trainer(content: bytes, model: SentencePieceModel) -> None:
    for number, value in _fields(content):
        if not isinstance(value, int):
            continue
        if number == 3:
            model.model_type = ModelType(value)
        elif number == 24:
            model.whitespace_as_suffix = bool(value)
        elif number == 35:
            model.byte_fallback = bool(value)
        elif number == 41:
            model.bos_id = _signed(value)
        elif number == 42:
            model.eos_id = _signed(value)
        elif number == 43:
            model.pad_id = _signed(value)


def _read_normalizer(content: bytes, model: SentencePieceModel) -> None:
    for number, value in _fields(content):
        if number == 2 and isinstance(value, bytes):
            model.charsmap = value
        elif number == 3:
            model.add_dummy_prefix = bool(value)
        elif number == 4:
            model.remove_extra_whitespaces = bool(value)
        elif number == 5:
            model.escape_whitespaces = bool(value)


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield the number and value of each field; values that are no floats of 32 bits are raw."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire_type = key >> 3, key & 7
        value: int | float | bytes
        if wire_type == _VARINT:
            value, at = _varint(content, at)
        elif wire_type == _BYTES:
            size, at = _varint(content, at)
            value, at = _take(content, at, size), at + size
        elif wire_type == _FIXED32:
            value, at = struct.unpack("<f", _take(content, at, 4))[0], at + 4
        elif wire_type == _FIXED64:
            value, at = _take(content, at, 8), at + 8
        else:
            raise _Damaged(f"wire type {wire_type} at byte {at}")
        yield number, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return the number of 7 bits a byte at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise _Damaged(f"it ends at byte {at}, inside a number")
        value |= (content[at] & 0x7F) << shift
        at += 1
        if content[at - 1] < 0x80:
            return value, at
    raise _Damaged(f"the number at byte {at} is too long")


def _take(content: bytes, at: int, size: int) -> bytes:
    if at + size > len(content):
        raise _Damaged(f"it has {len(content):,} bytes and goes on to {at + size:,}")
    return content[at : at + size]


def _signed(value: int) -> int:
    """Return an int32, which protocol buffers store as 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
