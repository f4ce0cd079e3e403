"""Linear layers on weights in AutoAWQ's layout and on 8-bit floats, under their published names."""

from __future__ import annotations

from typing import Literal

from tvm.relax.frontend import nn

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu import packing
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.linear import num_blocks
from mlc_llm.kernels.cpu.vector_math import LANES
from mlc_llm.nn import gpu_codes, ops
from mlc_llm.nn.kernel_call import on_gpu
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.ops import Rows

BLOCK_SIZE = 128  # rows and columns that share a scale, in both published block formats


class AwqLinear(nn.Module):
    """Linear stored as AutoAWQ does: weight = (qweight - qzeros) * scales, groups of 128 inputs.

    qweight (in, out / 8) and qzeros (in / 128, out / 8) uint32, scales (in / 128, out) float16.
    """

    def __init__(self, linear: Linear, int8_isa: str | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.int8_isa = int8_isa
        groups = packing.AWQ_FORM.num_groups(self.in_features)
        words = self.out_features // 8
        self.qweight = nn.Parameter((self.in_features, words), "uint32")
        self.qzeros = nn.Parameter((groups, words), "uint32")
        self.scales = nn.Parameter((groups, self.out_features), "float16")
        self.bias = linear.bias

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, out) float32 for x (n, in) float32."""
        stored = (self.qweight, self.qzeros, self.scales)
        return _awq_linear(x, stored, self.bias, self.out_features, self.int8_isa)


@on_gpu(gpu_codes.awq_linear)
def _awq_linear(
    x: nn.Tensor | Rows,
    stored: tuple[nn.Tensor, nn.Tensor, nn.Tensor],
    bias: nn.Tensor | None,
    out_features: int,
    int8_isa: str | None,
) -> nn.Tensor:
    qweight, qzeros, scales = stored
    form, rows, columns = packing.AWQ_FORM, out_features, int(qweight.shape[0])
    kernel = ops.kernel_of(packing.awq_words, rows, columns)
    words = ops.emit(
        "pack_words", kernel, [qweight], list(form.word_shape(rows, columns)), "uint32"
    )
    kernel = ops.kernel_of(packing.awq_scales, rows, form.num_groups(columns))
    shape = list(form.scale_shape(rows, columns))
    packed = (words, ops.emit("pack_scales", kernel, [qzeros, scales], shape))
    return ops.group_linear_packed(x, packed, bias, rows, form, int8_isa)


class Float8Linear(nn.Module):
    """Linear whose weight is 8-bit floats; activations are float32.

    scales: "none"; "tensor", with `q_scale` (1) and `q_calibration_scale` (1); "block", with
    `weight_scale_inv` for 128 x 128 blocks and, if `has_activation_scale`, `activation_scale` (1).
    Scales of activations are kept for programs that round activations; here they are exact.
    """

    def __init__(
        self,
        linear: Linear,
        dtype: Literal["float8_e4m3fn", "float8_e5m2"],
        scales: Literal["none", "tensor", "block"],
        has_activation_scale: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.is_block = scales == "block"
        group_size = BLOCK_SIZE if self.is_block else None
        self.form = packing.float8_form(dtype, self.in_features, group_size)
        weight = nn.Parameter((self.out_features, self.in_features), dtype)
        if self.is_block:
            self.weight = weight
            extents = (-(-self.out_features // BLOCK_SIZE), -(-self.in_features // BLOCK_SIZE))
            self.weight_scale_inv = nn.Parameter(extents, "float32")
            if has_activation_scale:
                self.activation_scale = nn.Parameter((1,), "float32")
        else:
            self.q_weight = weight
            if scales == "tensor":
                self.q_calibration_scale = nn.Parameter((1,), "float32")
                self.q_scale = nn.Parameter((1,), "float32")
        self.has_scale = scales != "none"
        self.bias = linear.bias

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, out) float32 for x (n, in) float32."""
        scales = None
        if self.has_scale:
            scales = self.weight_scale_inv if self.is_block else self.q_scale
        weight = self.weight if self.is_block else self.q_weight
        return _float8_linear(x, weight, scales, self.bias, self.form)

    def read_words(self) -> None:
        """Let the weight be words of four numbers, as kernels of GPUs take it.

        Files keep the numbers; `GPUMemory.put` brings them as words.
        """
        if self.in_features % 4:
            raise UnsupportedModel(
                f"its layers have {self.in_features} inputs, and GPUs read four 8-bit floats at "
                "once; convert it to q4f16_1"
            )
        words = nn.Parameter((self.out_features, self.in_features // 4), "uint32")
        setattr(self, "weight" if self.is_block else "q_weight", words)


@on_gpu(gpu_codes.float8_linear)
def _float8_linear(
    x: nn.Tensor | Rows,
    weight: nn.Tensor,
    scales: nn.Tensor | None,
    bias: nn.Tensor | None,
    form: GroupFormat,
) -> nn.Tensor:
    rows, columns = (int(extent) for extent in weight.shape)
    kernel = ops.kernel_of(packing.float8_words, rows, columns, form)
    shape = list(form.word_shape(rows, columns))
    words = ops.emit("pack_words", kernel, [weight], shape, "uint32")
    shape = [num_blocks(rows), form.num_groups(columns), LANES]
    if scales is None:
        packed = nn.op.ones(shape, "float32")
    else:
        extents = tuple(int(extent) for extent in scales.shape)
        kernel = ops.kernel_of(packing.float8_scales, rows, columns, form, extents)
        packed = ops.emit("pack_scales", kernel, [scales], shape)
    return ops.group_linear_packed(x, (words, packed), bias, rows, form, None)
