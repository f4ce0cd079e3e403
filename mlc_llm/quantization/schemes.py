"""The quantization schemes by name: a table of data.

Knows how weights are stored, not how they are packed (group.py) nor which layers are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlc_llm.errors import OptionError


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are stored; `dtype` is that of all that is not quantized.

    kind "none" quantizes nothing. kind "group" stores `bits` wide unsigned codes in uint32 words
    and one scale of `dtype` per `group_size` inputs. layout: "NK" keeps linears as (out, in), "KN"
    stores them transposed; embeddings are always NK.
    kind "awq" is AutoAWQ's layout, asymmetric, and "float8" 8-bit floats of `float8_dtype` with
    `float8_scales`. kind "gguf" keeps the codes of a GGUF file, in a format for each layer.
    """

    name: str
    kind: Literal["none", "group", "awq", "float8", "gguf"]
    dtype: Literal["float16", "bfloat16", "float32"]
    bits: int = 0
    group_size: int = 0
    layout: Literal["NK", "KN"] = "NK"
    quantize_embedding: bool = True
    quantize_final_fc: bool = True
    float8_dtype: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn"
    float8_scales: Literal["none", "tensor", "block"] = "none"
    has_activation_scale: bool = False

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


_LINEARS_ONLY: Any = {"quantize_embedding": False, "quantize_final_fc": False}


def _float8(name: str, dtype: Any, float8_dtype: Any, scales: Any) -> Scheme:
    return Scheme(
        name,
        "float8",
        dtype,
        float8_dtype=float8_dtype,
        float8_scales=scales,
        has_activation_scale=name.endswith("static_activation"),
        **_LINEARS_ONLY,
    )


_TABLE = (
    Scheme("q0f16", "none", "float16"),
    Scheme("q0bf16", "none", "bfloat16"),
    Scheme("q0f32", "none", "float32"),
    Scheme("q3f16_0", "group", "float16", bits=3, group_size=40, layout="KN"),
    Scheme("q3f16_1", "group", "float16", bits=3, group_size=40),
    Scheme("q4f16_0", "group", "float16", bits=4, group_size=32, layout="KN"),
    Scheme("q4f16_1", "group", "float16", bits=4, group_size=32),
    Scheme("q4f16_2", "group", "float16", bits=4, group_size=32, **_LINEARS_ONLY),
    Scheme("q4bf16_0", "group", "bfloat16", bits=4, group_size=32, layout="KN"),
    Scheme("q4bf16_1", "group", "bfloat16", bits=4, group_size=32),
    Scheme("q4f32_1", "group", "float32", bits=4, group_size=32),
    Scheme("q8f16_1", "group", "float16", bits=8, group_size=32),
    Scheme("q4f16_autoawq", "awq", "float16", bits=4, group_size=128, **_LINEARS_ONLY),
    _float8("e5m2_e5m2_f16", "float16", "float8_e5m2", "none"),
    _float8("e4m3_e4m3_f16", "float16", "float8_e4m3fn", "tensor"),
    _float8("e4m3_e4m3_f16_max_calibrate", "float16", "float8_e4m3fn", "tensor"),
    _float8("fp8_e4m3fn_bf16_block_scale", "bfloat16", "float8_e4m3fn", "block"),
    _float8("fp8_e4m3fn_bf16_block_scale_static_activation", "bfloat16", "float8_e4m3fn", "block"),
    Scheme("gguf", "gguf", "float16"),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}
# Schemes of MLC LLM that we know and do not have, and why.
REFUSED = {
    "q4f16_ft": "its weights are stored in the order of one NVIDIA GPU's matrix instructions, "
    "which no other device can read; choose q4f16_1, which has as many bits",
}


def get_scheme(name: str) -> Scheme:
    """Return the scheme of that name. Raises OptionError, which lists the names."""
    if name in REFUSED:
        raise OptionError(f"quantization {name} is not portable: {REFUSED[name]}")
    if name not in SCHEMES:
        raise OptionError(f"quantization {name!r} is not known; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
