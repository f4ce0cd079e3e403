"""How groups of quantized weights lie in words: the numbers their kernels need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mlc_llm.kernels.cpu.linear import num_blocks
from mlc_llm.kernels.cpu.vector_math import LANES


@dataclass(frozen=True)
class GroupFormat:
    """Numbers of a group quantization that its kernels need.

    A weight is (code - zero_point) * scale, or code * scale + minimum where groups have one.
    With a `float_code` codes are numbers of that 8-bit dtype, and a weight is code * scale.
    Codes of 3, 4 and 8 bits fill words from the low end. Those of 5 and 6 bits lie in two planes:
    a group's words of low 4 bits, then its words of high bits, see `high_bits_at`.
    """

    bits: int
    group_size: int
    scale_dtype: str
    is_transposed: bool  # portable arrays are (in, out): the KN layout
    code_of_zero: int | None = None  # where it is not the middle of the codes
    has_minimum: bool = False
    float_code: Literal["float8_e4m3fn", "float8_e5m2"] | None = None

    @property
    def low_bits(self) -> int:
        """Return the bits of a code that lie together in the low plane."""
        return 4 if self.bits in (5, 6) else self.bits

    @property
    def high_bits(self) -> int:
        """Return the bits of a code in the high plane: 1, 2, or 0 where there is none."""
        return self.bits - self.low_bits

    @property
    def values_per_word(self) -> int:
        """Return how many values one uint32 (of the low plane) holds."""
        return 32 // self.low_bits

    @property
    def low_words(self) -> int:
        """Return how many uint32 the low plane of one group takes."""
        return self.group_size // self.values_per_word

    @property
    def words_per_group(self) -> int:
        """Return how many uint32 one group takes."""
        return self.low_words + self.group_size * self.high_bits // 32

    @property
    def scales_per_group(self) -> int:
        """Return how many values stand beside the codes of a group: its scale and its minimum."""
        return 2 if self.has_minimum else 1

    @property
    def zero_point(self) -> int:
        """Return the code of zero; 0 where groups have a minimum."""
        if self.has_minimum:
            return 0
        return (1 << (self.bits - 1)) - 1 if self.code_of_zero is None else self.code_of_zero

    def high_bits_at(self, k: Any) -> tuple[Any, Any]:
        """Return where in a group its value k has its high bits: word of the plane, and shift.

        Values of a low word that are extracted together (every second one) form a quad; a byte
        of a high word holds the bits of one value of each of 8 / high_bits quads.
        """
        per_word = 8 // self.high_bits
        quad = k // 8 * 2 + k % 2
        return quad // per_word, k % 8 // 2 * 8 + quad % per_word * self.high_bits

    def with_byte_codes(self) -> GroupFormat:
        """Return the format in which codes fall into bytes: 3-bit codes move to 4 bits."""
        if self.bits != 3:
            return self
        return dataclasses.replace(self, bits=4, code_of_zero=self.zero_point)

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups along the input dimension."""
        return -(-in_features // self.group_size)

    def word_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return the shape of the packed words."""
        words = self.num_groups(in_features) * self.words_per_group
        return (num_blocks(out_features), words, LANES)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return the shape of the packed scales."""
        columns = self.num_groups(in_features) * self.scales_per_group
        return (num_blocks(out_features), columns, LANES)
