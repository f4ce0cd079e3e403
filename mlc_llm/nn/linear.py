"""Linear and embedding layers, plain, in pairs of bfloat16 and group-quantized: one interface."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.nn import ops
from mlc_llm.nn.ops import Rows


class Linear(nn.Module):
    """y = x · weightᵀ + bias; weight (out, in) in the model's dtype, x float32."""

    def __init__(self, in_features: int, out_features: int, dtype: str, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype_name = in_features, out_features, dtype
        self.weight = nn.Parameter((out_features, in_features), dtype)
        self.bias = nn.Parameter((out_features,), dtype) if bias else None

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, out) float32 for x (n, in) float32."""
        return ops.linear_packed(x, ops.pack_linear(self.weight), self.bias, self.out_features)


class Embedding(nn.Module):
    """Token table, weight (vocab, hidden); also serves as output layer where weights are tied."""

    def __init__(self, num_embeddings: int, features: int, dtype: str) -> None:
        super().__init__()
        self.num_embeddings, self.features, self.dtype_name = num_embeddings, features, dtype
        self.weight = nn.Parameter((num_embeddings, features), dtype)

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32 for ids (n) int32."""
        return ops.embed_packed(ids, ops.pack_linear(self.weight), self.num_embeddings)

    def logits(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, vocab) float32: products with every row of the table."""
        return ops.linear_packed(x, ops.pack_linear(self.weight), None, self.num_embeddings)


class Bf16Linear(nn.Module):
    """Linear whose input is rounded to bfloat16, to be multiplied with bfloat16 weights.

    isa: name of the instruction set that does it, see `kernels.cpu.isa.BF16_ISAS`.
    """

    def __init__(self, linear: Linear, isa: str) -> None:
        super().__init__()
        self.out_features, self.isa = linear.out_features, isa
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, out) float32 for x (n, in) float32."""
        packed = ops.pack_pairs(self.weight)
        return ops.bf16_linear_packed(x, packed, self.bias, self.out_features, self.isa)


class Bf16Embedding(nn.Module):
    """Embedding whose logits are computed as `Bf16Linear` does."""

    def __init__(self, table: Embedding, isa: str) -> None:
        super().__init__()
        self.num_embeddings, self.features = table.num_embeddings, table.features
        self.weight, self.isa = table.weight, isa

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32 for ids (n) int32."""
        packed = ops.pack_pairs(self.weight)
        return ops.bf16_embed_packed(ids, packed, self.num_embeddings, self.features)

    def logits(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, vocab) float32: products with every row of the table."""
        packed = ops.pack_pairs(self.weight)
        return ops.bf16_linear_packed(x, packed, None, self.num_embeddings, self.isa)


class GroupQuantizedLinear(nn.Module):
    """Linear whose weight is stored as `q_weight` and `q_scale`.

    int8_isa: instruction set of the kernel for int8 activations, None for float32 activations.
    """

    def __init__(self, linear: Linear, form: GroupFormat, int8_isa: str | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.int8_isa = form, int8_isa
        groups = form.num_groups(self.in_features)
        word_shape = (self.out_features, groups * form.words_per_group)
        scale_shape = (self.out_features, groups * form.scales_per_group)
        if form.is_transposed:
            word_shape, scale_shape = word_shape[::-1], scale_shape[::-1]
        self.q_weight = nn.Parameter(word_shape, "uint32")
        self.q_scale = nn.Parameter(scale_shape, form.scale_dtype)
        self.bias = linear.bias

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, out) float32 for x (n, in) float32."""
        packed, form = _pack(
            self.q_weight, self.q_scale, self.form, self.in_features, self.int8_isa
        )
        return ops.group_linear_packed(x, packed, self.bias, self.out_features, form, self.int8_isa)


class GroupQuantizedEmbedding(nn.Module):
    """Embedding whose table is stored as `q_weight` and `q_scale`; never transposed."""

    def __init__(self, table: Embedding, form: GroupFormat, int8_isa: str | None) -> None:
        super().__init__()
        self.num_embeddings, self.features = table.num_embeddings, table.features
        self.form, self.int8_isa = form, int8_isa
        groups = form.num_groups(self.features)
        words = groups * form.words_per_group
        self.q_weight = nn.Parameter((self.num_embeddings, words), "uint32")
        scales = groups * form.scales_per_group
        self.q_scale = nn.Parameter((self.num_embeddings, scales), form.scale_dtype)

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32 for ids (n) int32."""
        packed, form = _pack(self.q_weight, self.q_scale, self.form, self.features, self.int8_isa)
        return ops.group_embed_packed(ids, packed, self.num_embeddings, self.features, form)

    def logits(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, vocab) float32: products with every row of the table."""
        packed, form = _pack(self.q_weight, self.q_scale, self.form, self.features, self.int8_isa)
        return ops.group_linear_packed(x, packed, None, self.num_embeddings, form, self.int8_isa)


def _pack(
    q_weight: nn.Tensor,
    q_scale: nn.Tensor,
    form: GroupFormat,
    in_features: int,
    int8_isa: str | None,
) -> tuple[tuple[nn.Tensor, nn.Tensor], GroupFormat]:
    """Return packed arrays and the format they are in."""
    is_int8 = int8_isa is not None
    packed = ops.pack_group(q_weight, q_scale, form, in_features, byte_codes=is_int8)
    return packed, form.with_byte_codes() if is_int8 else form
