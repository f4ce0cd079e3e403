"""How kernels of GPUs read the weights of experts as the artifact stores them.

They are read in units: inputs of one expert and one output that a thread loads at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.group_format import GroupFormat

# Bytes of plain weights that are a unit; quantized ones come in groups.
_UNIT_BYTES = 16
_WORD_LANES = 4


@dataclass(frozen=True)
class ExpertWeights:
    """Weights (experts, out, in) of `dtype`, or words and scales (experts, out, ...) of a form."""

    num_experts: int
    out_features: int
    in_features: int
    dtype: str
    form: GroupFormat | None = None

    @property
    def unit(self) -> int:
        """Return the inputs of a unit."""
        return self.form.group_size if self.form else _UNIT_BYTES // _bytes_of(self.dtype)

    @property
    def num_units(self) -> int:
        """Return the units of a row; the last one may be partly beyond its end."""
        return -(-self.in_features // self.unit)

    @property
    def held(self) -> tuple[int, str]:
        """Return the size and dtype of the array that a unit is loaded into."""
        return (self.form.words_per_group, "uint32") if self.form else (self.unit, self.dtype)

    @property
    def index_dtype(self) -> str:
        """Return the dtype that can number what is stored."""
        row = self.num_units * self.held[0]
        return "int64" if self.num_experts * self.out_features * row >= 1 << 31 else "int32"

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return the shapes of words and scales; of plain weights both are the weights'."""
        rows = (self.num_experts, self.out_features)
        if self.form is None:
            return (*rows, self.in_features), (*rows, self.in_features)
        return (*rows, self.num_units * self.form.words_per_group), (*rows, self.num_units)

    def lanes(self, load_bytes: int) -> int:
        """Return how many inputs, or words, a thread loads at once."""
        if self.form is not None:
            return math.gcd(self.form.words_per_group, _WORD_LANES)
        # No language but CUDA has vectors of eight.
        most = max(4, load_bytes // _bytes_of(self.dtype))
        return math.gcd(math.gcd(self.unit, self.in_features), most)

    def loader(self, load_bytes: int) -> Any:
        """Return a macro load(words, scales, held, factor, e, o, u): unit u of a row.

        factor: float32 (1), the scale. Plain weights are `words`; past the end of a row its last
        ones come again.
        """
        size, index = self.held[0], self.index_dtype
        lanes, is_plain = self.lanes(load_bytes), self.form is None
        row = self.shapes[0][2]
        is_even = row % size == 0

        def within(column: Any) -> Any:
            return column if is_even else T.min(column, row - lanes)

        @T.macro
        def load(
            words: T.handle,
            scales: T.handle,
            held: T.handle,
            factor: T.handle,
            e: T.int32,
            o: T.int32,
            u: T.int32,
        ) -> None:
            expert: T.let = T.Cast(index, e)
            for v in T.unroll(size // lanes):
                first: T.let = within(u * size + v * lanes)
                for w in T.vectorized(lanes):
                    held[v * lanes + w] = words[expert, o, first + w]
            if not is_plain:
                factor[0] = T.Cast("float32", scales[expert, o, u])

        return load

    def value(self, held: Any, factor: Any, i: Any) -> Any:
        """Return weight i of a unit that was loaded, float32."""
        if self.form is None:
            return T.Cast("float32", held[i])
        bits, per_word = self.form.bits, self.form.values_per_word
        shift = T.Cast("uint32", i % per_word * bits)
        code = T.bitwise_and(T.shift_right(held[i // per_word], shift), T.uint32((1 << bits) - 1))
        return (T.Cast("float32", code) - T.float32(self.form.zero_point)) * factor[0]


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
