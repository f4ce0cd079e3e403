"""The blocks of GGUF encodings as codes, scales and minima of groups, without dequantizing.

Knows the encodings of FORMATS. Layouts: ggml-common.h and ggml-quants.c of llama.cpp. Does not
know the container nor names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.quantization.encoded import GroupCodes

Bytes = NDArray[np.uint8]
Decoded = tuple[Bytes, NDArray[np.float32], NDArray[np.float32] | None]

# Encoding -> the format of layers that holds its codes, see `quantization.formats`. 2- and 3-bit
# codes take 4 bits; the numbers that 4-bit codes of IQ4 stand for take 8.
FORMATS = {
    "Q4_0": "q4_g32_z8",
    "Q4_1": "q4_g32_min",
    "Q5_0": "q5_g32_z16",
    "Q5_1": "q5_g32_min",
    "Q8_0": "q8_g32_z128",
    "Q2_K": "q4_g16_min",
    "Q3_K": "q4_g16_z4",
    "Q4_K": "q4_g32_min",
    "Q5_K": "q5_g32_min",
    "Q6_K": "q6_g16_z32",
    "IQ4_NL": "q8_g32_z128",
    "IQ4_XS": "q8_g32_z128",
}

_IQ4_NUMBERS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)


def decode_blocks(blocks: Bytes, encoding: str, rows: int) -> GroupCodes:
    """Return the codes of a matrix.

    blocks: (blocks, bytes of a block) uint8, row after row; encoding: a key of FORMATS.
    """
    zero, decode = _DECODERS[encoding]
    codes, scale, minimum = decode(blocks)
    return GroupCodes(
        codes.reshape(rows, -1),
        scale.reshape(rows, -1),
        zero,
        None if minimum is None else minimum.reshape(rows, -1),
    )


def _half(blocks: Bytes, at: int) -> NDArray[np.float32]:
    """Return the float16 at byte `at` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Return low nibbles, then high ones: (..., bytes) -> (..., 2 * bytes)."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _q4_0(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Return bit 4 of 32 codes, from 4 bytes of a block: (blocks, 32), 0 or 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Decoded:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0), None


def _six_bit_pairs(packed: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the 8 scales and 8 minima of a block from its 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    low, high = np.uint8(15), np.uint8(4)
    scale = [first & 63, (rest & low) | ((first >> 6) << high)]
    minimum = [second & 63, (rest >> high) | ((second >> 6) << high)]
    return (
        np.concatenate(scale, axis=1).astype(np.float32),
        np.concatenate(minimum, axis=1).astype(np.float32),
    )


def _pairs_of_32(packed: Bytes) -> Bytes:
    """Return 256 nibbles of 128 bytes: of each 32 bytes the low ones, then the high ones."""
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(len(packed), 256)


def _q4_k(blocks: Bytes) -> Decoded:
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    codes = _pairs_of_32(blocks[:, 16:])
    return codes, _half(blocks, 0) * scale, -_half(blocks, 2) * minimum


def _q5_k(blocks: Bytes) -> Decoded:
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    # Bit j of byte i is for the value i of the j-th 32.
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    codes = _pairs_of_32(blocks[:, 48:]) | (high.reshape(-1, 256) << np.uint8(4))
    return codes, _half(blocks, 0) * scale, -_half(blocks, 2) * minimum


def _two_bits(packed: Bytes) -> Bytes:
    """Return 2-bit fields (blocks, halves, 4 * bytes): field j of all bytes of a half, by j."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    fields = packed[:, :, None, :] >> shifts & np.uint8(3)
    return fields.reshape(*packed.shape[:2], -1)


def _q6_k(blocks: Bytes) -> Decoded:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))  # (blocks, halves, 128)
    high = _two_bits(blocks[:, 128:192].reshape(-1, 2, 32))
    codes = (low | (high << np.uint8(4))).reshape(-1, 256)
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, _half(blocks, 208) * scale, None


def _q2_k(blocks: Bytes) -> Decoded:
    codes = _two_bits(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 256)
    scale = (blocks[:, :16] & 15).astype(np.float32)
    minimum = (blocks[:, :16] >> 4).astype(np.float32)
    return codes, _half(blocks, 80) * scale, -_half(blocks, 82) * minimum


def _q3_k(blocks: Bytes) -> Decoded:
    low = _two_bits(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 256)
    high = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").swapaxes(1, 2)
    codes = low | (high.reshape(-1, 256) << np.uint8(2))
    packed = blocks[:, 96:108]
    low_bits = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high_bits = (packed[:, None, 8:] >> shifts & np.uint8(3)).reshape(-1, 16)
    scale = (low_bits | (high_bits << np.uint8(4))).astype(np.float32) - 32
    return codes, _half(blocks, 108) * scale, None


def _iq4_codes(nibbles: Bytes) -> Bytes:
    return _IQ4_NUMBERS[nibbles].view(np.uint8) ^ np.uint8(128)


def _iq4_nl(blocks: Bytes) -> Decoded:
    return _iq4_codes(_nibbles(blocks[:, 2:])), _half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Decoded:
    codes = _iq4_codes(_nibbles(blocks[:, 8:].reshape(-1, 8, 16))).reshape(-1, 256)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    both = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16)
    high = (both >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)).astype(np.uint8)
    scale = (low | (high << np.uint8(4))).astype(np.float32) - 32
    return codes, _half(blocks, 0) * scale, None


_DECODERS: dict[str, tuple[int, Callable[[Any], Decoded]]] = {
    "Q4_0": (8, _q4_0),
    "Q4_1": (0, _q4_1),
    "Q5_0": (16, _q5_0),
    "Q5_1": (0, _q5_1),
    "Q8_0": (128, _q8_0),
    "Q2_K": (0, _q2_k),
    "Q3_K": (4, _q3_k),
    "Q4_K": (0, _q4_k),
    "Q5_K": (0, _q5_k),
    "Q6_K": (32, _q6_k),
    "IQ4_NL": (128, _iq4_nl),
    "IQ4_XS": (128, _iq4_xs),
}
