"""The quantization schemes by name: a table of data.

Knows how weights are stored, not how they are packed (group.py) nor which layers are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlc_llm.errors import OptionError


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are stored.

    kind "none" stores every weight as `dtype`. kind "group" stores `bits` wide unsigned codes in
    uint32 words and one scale of `dtype` per `group_size` inputs; `dtype` is the model's dtype too.
    layout: "NK" keeps linears as (out, in), "KN" stores them transposed; embeddings are always NK.
    """

    name: str
    kind: Literal["none", "group"]
    dtype: Literal["float16", "bfloat16", "float32"]
    bits: int = 0
    group_size: int = 0
    layout: Literal["NK", "KN"] = "NK"
    quantize_embedding: bool = True
    quantize_final_fc: bool = True

    @property
    def values_per_word(self) -> int:
        """Codes in one uint32; bits that are left over stay zero."""
        return 32 // self.bits

    @property
    def max_int(self) -> int:
        """The code of weight zero, and the largest magnitude: codes run from 0 to 2 * max_int."""
        return (1 << (self.bits - 1)) - 1

    @property
    def words_per_group(self) -> int:
        """uint32 words one group takes."""
        return self.group_size // self.values_per_word

    def num_groups(self, in_features: int) -> int:
        """Groups along an input dimension; the last one may be partly padding."""
        return -(-in_features // self.group_size)


_TABLE = (
    Scheme("q0f16", "none", "float16"),
    Scheme("q0bf16", "none", "bfloat16"),
    Scheme("q0f32", "none", "float32"),
    Scheme("q3f16_0", "group", "float16", bits=3, group_size=40, layout="KN"),
    Scheme("q3f16_1", "group", "float16", bits=3, group_size=40),
    Scheme("q4f16_0", "group", "float16", bits=4, group_size=32, layout="KN"),
    Scheme("q4f16_1", "group", "float16", bits=4, group_size=32),
    Scheme(
        "q4f16_2",
        "group",
        "float16",
        bits=4,
        group_size=32,
        quantize_embedding=False,
        quantize_final_fc=False,
    ),
    Scheme("q4bf16_0", "group", "bfloat16", bits=4, group_size=32, layout="KN"),
    Scheme("q4bf16_1", "group", "bfloat16", bits=4, group_size=32),
    Scheme("q4f32_1", "group", "float32", bits=4, group_size=32),
    Scheme("q8f16_1", "group", "float16", bits=8, group_size=32),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}


def get_scheme(name: str) -> Scheme:
    """Return the scheme of that name. Raises OptionError, which lists the names."""
    if name not in SCHEMES:
        raise OptionError(f"quantization {name!r} is not known; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
