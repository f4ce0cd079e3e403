"""Products with AutoAWQ's codes and 8-bit floats, run as WGSL, against NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from packed_layouts import awq_pack, awq_unpack, float8_table

from mlc_llm.kernels.gpu import codes

OUT, IN = 136, 256


def check(webgpu: Any, kernel: Any, weight: np.ndarray, n: int, **stored: np.ndarray) -> None:
    dtype = str(stored["bias"].dtype) if "bias" in stored else "float32"
    x = np.random.default_rng(1).standard_normal((n, IN)).astype(dtype)
    out = np.zeros((n, OUT), dtype)
    expected = x.astype(np.float64) @ weight.T + stored.get("bias", np.zeros(OUT))
    found = webgpu.run(kernel, x=x, **stored, out=out)["out"].astype(np.float64)
    tolerance = 1e-5 if dtype == "float32" else 4e-3
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


# One row, as in decoding, is known when a kernel is made; many are not.
@pytest.mark.parametrize("n", [1, 5])
def test_codes_of_awq(webgpu: Any, n: int) -> None:
    if not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    draw = np.random.default_rng(0)
    qweight = awq_pack(draw.integers(0, 16, (IN, OUT)))
    qzeros = awq_pack(draw.integers(0, 16, (IN // 128, OUT)))
    scales = draw.uniform(0.01, 0.1, (IN // 128, OUT)).astype(np.float16)
    bias = draw.standard_normal(OUT).astype(np.float16)
    kernel = codes.awq_matmul(None if n > 1 else 1, OUT, IN, "float16", True)
    stored = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "bias": bias}
    check(webgpu, kernel, awq_unpack(qweight, qzeros, scales), n, **stored)


@pytest.mark.parametrize(
    ("code", "kind", "n"),
    [
        ("float8_e5m2", "none", 5),
        ("float8_e4m3fn", "tensor", 5),
        ("float8_e4m3fn", "block", 5),
        ("float8_e4m3fn", "block", 1),
    ],
)
def test_8_bit_floats(webgpu: Any, code: str, kind: str, n: int) -> None:
    draw = np.random.default_rng(0)
    stored = draw.standard_normal((OUT, IN)).astype(getattr(ml_dtypes, code)).view(np.uint8)
    stored[:, :9] = np.arange(9) | draw.integers(0, 2, (OUT, 9)) << 7  # numbers near 0, and 0
    weight = float8_table(4 if code == "float8_e4m3fn" else 5)[stored]
    tensors = {"words": stored.view(np.uint32)}
    if kind == "tensor":
        tensors["scales"] = np.array([0.37], np.float32)
        weight = weight * 0.37
    elif kind == "block":
        tensors["scales"] = draw.uniform(0.01, 2, (2, 2)).astype(np.float32)
        scales = tensors["scales"].repeat(128, 0).repeat(128, 1)
        weight = weight * scales[:OUT, :IN]
    rows = None if n > 1 else 1
    kernel: Any = codes.float8_matmul(rows, OUT, IN, code, kind, "float32", False)  # type: ignore[arg-type]
    check(webgpu, kernel, weight, n, **tensors)


@pytest.mark.parametrize(("code", "exponent_bits"), [("float8_e4m3fn", 4), ("float8_e5m2", 5)])
def test_every_8_bit_float(webgpu: Any, code: str, exponent_bits: int) -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    expected = float8_table(exponent_bits)
    is_number = np.isfinite(expected)
    kernel = codes.float8_matmul(None, 1, 256, code, "none", "float32", False)  # type: ignore[arg-type]
    x, out = np.eye(256, dtype=np.float32), np.zeros((256, 1), np.float32)
    found = webgpu.run(kernel, x=x, words=bytes_.view(np.uint32)[None], out=out)["out"][:, 0]
    np.testing.assert_array_equal(found[is_number], expected[is_number].astype(np.float32))
