"""Linears of `packed_linear.py` on GPUs: each a call of the kernel for its shapes."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.gpu import codes
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, kernel_of


def awq_linear(
    x: nn.Tensor,
    stored: tuple[nn.Tensor, nn.Tensor, nn.Tensor],
    bias: nn.Tensor | None,
    out_features: int,
    int8_isa: str | None,
) -> nn.Tensor:
    """Return x · weightᵀ (+ bias), (n, out); stored: qweight, qzeros and scales of AutoAWQ."""
    assert int8_isa is None
    options = (out_features, int(x.shape[1]), x.dtype, bias is not None)
    kernel = kernel_of(codes.awq_matmul, known_rows(x), *options)
    args = [x, *stored] if bias is None else [x, *stored, bias]
    out: nn.Tensor = call("awq_linear", kernel, args, [x.shape[0], out_features], x.dtype)
    return out


def float8_linear(
    x: nn.Tensor,
    words: nn.Tensor,
    scales: nn.Tensor | None,
    bias: nn.Tensor | None,
    form: GroupFormat,
) -> nn.Tensor:
    """Return x · weightᵀ (+ bias), (n, out); words (out, in / 4) uint32 of 8-bit floats."""
    kind = "none" if scales is None else "tensor" if len(scales.shape) == 1 else "block"
    out_features = int(words.shape[0])
    options = (out_features, int(x.shape[1]), form.float_code, kind, x.dtype, bias is not None)
    kernel = kernel_of(codes.float8_matmul, known_rows(x), *options)
    args = [tensor for tensor in (x, words, scales, bias) if tensor is not None]
    out: nn.Tensor = call("float8_linear", kernel, args, [x.shape[0], out_features], x.dtype)
    return out
