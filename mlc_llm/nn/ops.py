"""Operations that layers emit: each becomes a call of the kernel made for its shapes and dtypes.

The one place where a kernel is chosen. Kernels are memoised, so that equal layers share one. Those
for GPUs are chosen in `gpu_ops.py`, function by function.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tvm.relax.frontend import nn
from tvm.target import Target
from tvm.target.codegen import target_has_features

from mlc_llm.kernels.cpu import (
    activations,
    bf16_activations,
    bf16_linear,
    elementwise,
    group_linear,
    int8_linear,
    linear,
    rope,
    sampling,
)
from mlc_llm.kernels.cpu import attention as attention_kernels
from mlc_llm.kernels.cpu.activations import Int8Shape, Source
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.vector_math import LANES
from mlc_llm.nn import gpu_attention, gpu_ops
from mlc_llm.nn.kernel_call import call, on_gpu, require_cpu
from mlc_llm.nn.kernel_call import kernel_of as kernel_of


def emit(name: str, kernel: Any, args: list[Any], shape: list[Any], dtype: str = "float32") -> Any:
    """Return the result, of that shape and dtype, of a CPU kernel's call."""
    require_cpu(name)
    return call(name, kernel, args, shape, dtype)


def _has_wide_registers() -> bool:
    """Return whether the CPU that is compiled for has 32 registers of 16 float32 lanes."""
    target = Target.current(allow_none=True)
    return target is None or bool(target_has_features("avx512f", target))


def shared_rows() -> int:
    """Return how many rows of activations share a load of weights in float kernels."""
    return linear.ROWS if _has_wide_registers() else linear.FEW_ROWS


@dataclass(frozen=True)
class Rows:
    """Rows that are computed where they are used, so that a quantizer can compute them itself.

    kind and inputs are those of `activations.Source`; the rows are (n, width) float32.
    """

    kind: Literal["rms_norm", "silu_mul"]
    inputs: tuple[nn.Tensor, ...]
    width: int
    eps: float = 0.0

    def materialize(self) -> nn.Tensor:
        """Return the rows as a tensor."""
        if self.kind == "rms_norm":
            kernel = kernel_of(elementwise.rms_norm, self.width, self.inputs[1].dtype, self.eps)
        else:
            kernel = kernel_of(elementwise.silu_mul, self.width)
        return emit(self.kind, kernel, list(self.inputs), [self.inputs[0].shape[0], self.width])


@on_gpu(gpu_ops.rms_norm)
def rms_norm(x: nn.Tensor, weight: nn.Tensor, eps: float) -> Rows:
    """Return x / rms(x) * weight; x (n, h) float32."""
    return Rows("rms_norm", (x, weight), int(x.shape[1]), eps)


@on_gpu(gpu_ops.silu_mul)
def silu_mul(x: nn.Tensor) -> Rows:
    """Return silu(gate) * up; x (n, 2 * width) float32 holds [gate; up]."""
    return Rows("silu_mul", (x,), int(x.shape[1]) // 2)


def extents(x: nn.Tensor | Rows) -> tuple[Any, int]:
    """Return the number of rows and their width."""
    if isinstance(x, Rows):
        return x.inputs[0].shape[0], x.width
    tensor: Any = x
    return tensor.shape[0], int(tensor.shape[1])


def materialize(x: nn.Tensor | Rows) -> nn.Tensor:
    """Return the rows as a tensor."""
    return x.materialize() if isinstance(x, Rows) else x


@on_gpu(gpu_ops.add)
def add(x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
    """Return x + y, both (n, width) float32."""
    return emit("add", kernel_of(elementwise.add, int(x.shape[1])), [x, y], x.shape)


@on_gpu(gpu_ops.take_rows)
def take_rows(x: nn.Tensor, rows: nn.Tensor) -> nn.Tensor:
    """Return the given rows of x (n, width); rows (r) int32."""
    kernel = kernel_of(elementwise.take_rows, int(x.shape[1]))
    return emit("take_rows", kernel, [x, rows], [rows.shape[0], x.shape[1]])


@on_gpu(gpu_ops.pack_linear)
def pack_linear(weight: nn.Tensor) -> nn.Tensor:
    """Return an (out, in) weight in the kernel's layout; lifted into `pack_params`."""
    out_features, in_features = (int(extent) for extent in weight.shape)
    kernel = kernel_of(linear.interleave, out_features, in_features, weight.dtype, False)
    shape = list(linear.packed_shape(out_features, in_features))
    return emit("pack_linear", kernel, [weight], shape, weight.dtype)


@on_gpu(gpu_ops.linear_packed)
def linear_packed(
    x: nn.Tensor | Rows, packed: nn.Tensor, bias: nn.Tensor | None, out_features: int
) -> nn.Tensor:
    """Return x · weightᵀ (+ bias); x (n, in) float32."""
    x = materialize(x)
    n, in_features = x.shape
    has_bias = bias is not None
    kernel = kernel_of(
        linear.matmul, out_features, int(in_features), packed.dtype, has_bias, shared_rows()
    )
    args = [x, packed] if bias is None else [x, packed, bias]
    return emit("linear", kernel, args, [n, out_features])


@on_gpu(gpu_ops.embed_packed)
def embed_packed(ids: nn.Tensor, packed: nn.Tensor, num_embeddings: int) -> nn.Tensor:
    """Return rows of a packed table as float32; ids (n) int32."""
    features = int(packed.shape[1])
    kernel = kernel_of(linear.embed, num_embeddings, features, packed.dtype)
    return emit("embed", kernel, [ids, packed], [ids.shape[0], features])


def pack_pairs(weight: nn.Tensor) -> nn.Tensor:
    """Return an (out, in) bfloat16 weight as pairs of inputs; lifted into `pack_params`."""
    out_features, in_features = (int(extent) for extent in weight.shape)
    kernel = kernel_of(bf16_linear.pack, out_features, in_features)
    shape = list(bf16_linear.packed_shape(out_features, in_features))
    return emit("pack_pairs", kernel, [weight], shape, "uint32")


def bf16_linear_packed(
    x: nn.Tensor | Rows, packed: nn.Tensor, bias: nn.Tensor | None, out_features: int, isa: str
) -> nn.Tensor:
    """Return bfloat16(x) · weightᵀ (+ bias), float32; packed by `pack_pairs`."""
    n, in_features = extents(x)
    source, inputs = _source(x)
    kernel = kernel_of(bf16_activations.round_activations, in_features, source, isa)
    step = bf16_activations.ROW_STEP
    shape = [(n + step - 1) // step * step, bf16_activations.row_words(in_features)]
    name = "round" if source.kind == "plain" else f"{source.kind}_round"
    pairs = emit(name, kernel, list(inputs), shape, "int32")
    bias_dtype = None if bias is None else bias.dtype
    kernel = kernel_of(bf16_linear.matmul, out_features, in_features, isa, bias_dtype)
    args = [pairs, packed] if bias is None else [pairs, packed, bias]
    return emit("bf16_linear", kernel, args, [n, out_features])


def bf16_embed_packed(
    ids: nn.Tensor, packed: nn.Tensor, num_embeddings: int, features: int
) -> nn.Tensor:
    """Return rows of a table packed by `pack_pairs` as float32; ids (n) int32."""
    kernel = kernel_of(bf16_linear.embed, num_embeddings, features)
    return emit("embed", kernel, [ids, packed], [ids.shape[0], features])


@on_gpu(gpu_ops.pack_group)
def pack_group(
    q_weight: nn.Tensor,
    q_scale: nn.Tensor,
    form: GroupFormat,
    in_features: int,
    *,
    byte_codes: bool,
) -> tuple[nn.Tensor, nn.Tensor]:
    """Return portable words and scales in the kernel's layout; lifted into `pack_params`.

    byte_codes: pack as `form.with_byte_codes()`, which kernels with int8 activations read.
    """
    groups = form.num_groups(in_features)
    rows = int(q_weight.shape[1 if form.is_transposed else 0])
    packed_form = form.with_byte_codes() if byte_codes else form
    words = groups * packed_form.words_per_group
    if packed_form == form:
        kernel = kernel_of(linear.interleave, rows, words, "uint32", form.is_transposed)
    else:
        kernel = kernel_of(group_linear.widen_codes, rows, in_features, form)
    blocks, columns = linear.num_blocks(rows), groups * form.scales_per_group
    packed_words = emit("pack_words", kernel, [q_weight], [blocks, words, LANES], "uint32")
    kernel = kernel_of(linear.interleave, rows, columns, q_scale.dtype, form.is_transposed)
    shape = [blocks, columns, LANES]
    return packed_words, emit("pack_scales", kernel, [q_scale], shape, q_scale.dtype)


@on_gpu(gpu_ops.group_linear_packed)
def group_linear_packed(
    x: nn.Tensor | Rows,
    packed: tuple[nn.Tensor, nn.Tensor],
    bias: nn.Tensor | None,
    out_features: int,
    form: GroupFormat,
    int8_isa: str | None,
) -> nn.Tensor:
    """Return x · dequantized(weight)ᵀ (+ bias); x (n, in) float32.

    int8_isa: the instruction set for int8 activations, or None for float32 ones.
    """
    bias_dtype = None if bias is None else bias.dtype
    extra = [] if bias is None else [bias]
    if int8_isa is None:
        x = materialize(x)
        n, in_features = x.shape
        kernel = kernel_of(
            group_linear.matmul, out_features, int(in_features), form, bias_dtype, shared_rows()
        )
        return emit("group_linear", kernel, [x, *packed, *extra], [n, out_features])
    n, in_features = extents(x)
    shape = Int8Shape(out_features, in_features, form, int8_isa)
    kernel = kernel_of(int8_linear.matmul, shape, bias_dtype)
    args = [quantize_activations(x, shape), *packed, *extra]
    return emit("int8_linear", kernel, args, [n, out_features])


def quantize_activations(x: nn.Tensor | Rows, shape: Int8Shape) -> nn.Tensor:
    """Return x (n, in) rounded to int8, as linears of `shape` read it."""
    source, inputs = _source(x)
    # The kernel depends on the input alone: layers of one width share it.
    any_output = dataclasses.replace(shape, out_features=1)
    kernel = kernel_of(activations.quantize_activations, any_output, source)
    tiles = (inputs[0].shape[0] + activations.TILE - 1) // activations.TILE
    name = "quantize" if source.kind == "plain" else f"{source.kind}_quantize"
    return emit(name, kernel, list(inputs), [tiles, shape.width * activations.TILE], "int32")


def _source(x: nn.Tensor | Rows) -> tuple[Source, tuple[nn.Tensor, ...]]:
    """Return where a kernel that rounds activations takes them from, and its inputs."""
    if not isinstance(x, Rows):
        return Source(), (x,)
    weight_dtype = x.inputs[1].dtype if x.kind == "rms_norm" else "float32"
    return Source(x.kind, weight_dtype, x.eps), x.inputs


@on_gpu(gpu_ops.group_embed_packed)
def group_embed_packed(
    ids: nn.Tensor,
    packed: tuple[nn.Tensor, nn.Tensor],
    num_embeddings: int,
    features: int,
    form: GroupFormat,
) -> nn.Tensor:
    """Return dequantized rows as float32; ids (n) int32."""
    kernel = kernel_of(group_linear.embed, num_embeddings, features, form)
    return emit("group_embed", kernel, [ids, *packed], [ids.shape[0], features])


@on_gpu(gpu_attention.rope_table)
def rope_table(positions: nn.Tensor, frequencies: nn.Tensor, scale: float) -> nn.Tensor:
    """Return cosines and sines, (n, 2 * len(frequencies)); positions (n) int32."""
    rotary_dim = 2 * int(frequencies.shape[0])
    kernel = kernel_of(rope.rope_table, rotary_dim, scale)
    return emit("rope_table", kernel, [positions, frequencies], [positions.shape[0], rotary_dim])


@on_gpu(gpu_attention.rope_and_write)
def rope_and_write(
    qkv: nn.Tensor,
    table: nn.Tensor | None,
    slots: nn.Tensor,
    pages: nn.Tensor,
    shape: AttentionShape,
    is_interleaved: bool = False,
) -> tuple[nn.Tensor, nn.Tensor]:
    """Rotate q and k, write k and v into `pages` in place; return q and the same pages.

    Without a table nothing is rotated.
    """
    q = nn.Tensor.placeholder([qkv.shape[0], shape.num_heads, shape.head_dim], "float32")
    out = [nn.Tensor.placeholder(pages.shape, pages.dtype), q]
    if table is None:
        kernel, args = kernel_of(rope.write, shape), [qkv, slots, pages]
    else:
        rotary_dim = int(table.shape[1])
        kernel = kernel_of(rope.rope_and_write, shape, rotary_dim, is_interleaved)
        args = [qkv, table, slots, pages]
    written, rotated = nn.op.tensor_ir_inplace_op(
        kernel, "rope_and_write", args, [len(args) - 1, -1], out
    )
    return rotated, written


@on_gpu(gpu_attention.paged_attention)
def paged_attention(
    q: nn.Tensor,
    pages: nn.Tensor,
    query_start: nn.Tensor,
    page_table: nn.Tensor,
    context_len: nn.Tensor,
    positions: nn.Tensor,
    shape: AttentionShape,
    sink_logits: nn.Tensor | None = None,
) -> nn.Tensor:
    """Return causal attention over the pages of each token's sequence, (n, heads * head_dim).

    sink_logits: (heads), see `kernels.cpu.attention`.
    """
    if not _has_wide_registers():
        shape = dataclasses.replace(shape, span=1)
    args = [q, pages, query_start, page_table, context_len, positions]
    if sink_logits is None:
        kernel = kernel_of(attention_kernels.paged_attention, shape)
    else:
        kernel = kernel_of(attention_kernels.paged_attention, shape, sink_logits.dtype)
        args.append(sink_logits)
    width = shape.num_heads * shape.head_dim
    return emit("paged_attention", kernel, args, [q.shape[0], width])


def sample(
    logits: nn.Tensor,
    temperature: nn.Tensor,
    top_p: nn.Tensor,
    min_p: nn.Tensor,
    top_k: nn.Tensor,
    uniform: nn.Tensor,
) -> nn.Tensor:
    """Return one token a row, (r) int32; see `kernels.cpu.sampling.sample`."""
    args = [logits, temperature, top_p, min_p, top_k, uniform]
    return emit("sample", kernel_of(sampling.sample), args, [logits.shape[0]], "int32")
