"""How int8 linears take codes out of packed words, four at a time: the layout of `GroupFormat`."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.group_format import GroupFormat


def quad_codes(
    form: GroupFormat, words: Any, at: tuple[Any, Any, Any], lanes: int, quad: Any
) -> Any:
    """Return a quad of a group's codes as four bytes.

    at: block, group and first lane; quad: its number within the group.
    """
    block, group, lane = at
    first, places = group * form.words_per_group, T.ramp(lane, 1, lanes)
    if form.bits == 8:
        return words[block, first + quad, places]
    low = _bytes_at(words[block, first + quad // 2, places], 4 * (quad % 2), 0x0F, lanes)
    if not form.high_bits:
        return low
    per_word = 8 // form.high_bits
    word, shift = quad // per_word, quad % per_word * form.high_bits
    mask = (1 << form.high_bits) - 1
    high = _bytes_at(words[block, first + form.low_words + word, places], shift, mask, lanes)
    return T.bitwise_or(low, T.shift_left(high, T.broadcast(T.uint32(4), lanes)))


def _bytes_at(word: Any, shift: Any, mask: int, lanes: int) -> Any:
    """Return the bits of `mask` at `shift` of every byte of words."""
    shifted = T.shift_right(word, T.broadcast(T.Cast("uint32", shift), lanes))
    return T.bitwise_and(shifted, T.broadcast(T.uint32(mask * 0x01010101), lanes))
