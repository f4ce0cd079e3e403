"""Operations of `ops.py` and `row_ops.py` on GPUs: each a call of the kernel for its shapes.

Rows keep the dtype they have, which is the model's; weights are used as the artifact stores them,
so that packing does nothing.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.tirx import IntImm

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.norm import HeadNorm
from mlc_llm.kernels.cpu.query_scale import QueryScale
from mlc_llm.kernels.gpu import linear, rope, rows
from mlc_llm.nn.activations import ACTIVATIONS
from mlc_llm.nn.kernel_call import call, kernel_of
from mlc_llm.nn.rope import RopeConfig


def known_rows(x: nn.Tensor) -> int | None:
    """Return the number of rows, None where it is known at run time only."""
    count: Any = x.shape[0]
    return int(count) if isinstance(count, (int, IntImm)) else None


def _width(x: nn.Tensor) -> int:
    return int(x.shape[-1])


def _rowwise(name: str, kernel: Any, args: list[nn.Tensor], width: int) -> nn.Tensor:
    x = args[0]
    result: nn.Tensor = call(name, kernel, list(args), [x.shape[0], width], x.dtype)
    return result


def rms_norm(x: nn.Tensor, weight: nn.Tensor, eps: float) -> nn.Tensor:
    """Return x / rms(x) * weight, (n, h)."""
    kernel = kernel_of(rows.rms_norm, known_rows(x), _width(x), eps, x.dtype)
    return _rowwise("rms_norm", kernel, [x, weight], _width(x))


def layer_norm(
    x: nn.Tensor,
    weight: nn.Tensor | None,
    bias: nn.Tensor | None,
    eps: float,
    adds_one: bool = False,
) -> nn.Tensor:
    """Return (x - mean) / deviation * weight + bias, (n, h)."""
    width = _width(x)
    weight = nn.op.ones((width,), x.dtype) if weight is None else weight
    bias = nn.op.zeros((width,), x.dtype) if bias is None else bias
    kernel = kernel_of(rows.layer_norm, known_rows(x), width, eps, adds_one, x.dtype)
    return _rowwise("layer_norm", kernel, [x, weight, bias], width)


def norm_heads(x: nn.Tensor, q: nn.Tensor, k: nn.Tensor, shape: HeadNorm) -> nn.Tensor:
    """Return rows [q; k; v] with queries and keys normalised."""
    if shape.is_centered:
        raise UnsupportedModel("its layers need layer norms of heads, which GPUs have not yet")
    q_width, k_width = shape.num_q * shape.q_width, shape.num_k * shape.k_width
    queries = _norm_parts(columns(x, 0, q_width), q, shape.q_width, shape.eps)
    keys = _norm_parts(columns(x, q_width, k_width), k, shape.k_width, shape.eps)
    return join(queries, keys, columns(x, q_width + k_width, shape.v_width))


def _norm_parts(x: nn.Tensor, weight: nn.Tensor, part: int, eps: float) -> nn.Tensor:
    weight = nn.op.reshape(weight, (-1,)) if len(weight.shape) > 1 else weight
    weight = weight if weight.dtype == x.dtype else nn.op.astype(weight, x.dtype)
    items = int(weight.shape[0])
    kernel = kernel_of(rows.norm_parts, known_rows(x), _width(x), part, items, eps, x.dtype)
    return _rowwise("norm_parts", kernel, [x, weight], _width(x))


def columns(x: nn.Tensor, start: int, count: int) -> nn.Tensor:
    """Return the columns from `start` on, (n, count)."""
    kernel = kernel_of(rows.columns, known_rows(x), _width(x), start, count, x.dtype)
    return _rowwise("columns", kernel, [x], count)


def add(x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
    """Return x + y, both (n, width)."""
    kernel = kernel_of(rows.add, known_rows(x), _width(x), x.dtype)
    return _rowwise("add", kernel, [x, y], _width(x))


def join(*parts: nn.Tensor) -> nn.Tensor:
    """Return rows side by side."""
    joined, *rest = parts
    for part in rest:
        widths = _width(joined), _width(part)
        kernel = kernel_of(rows.join, known_rows(joined), widths, joined.dtype)
        joined = _rowwise("join", kernel, [joined, part], sum(widths))
    return joined


def silu_mul(x: nn.Tensor) -> nn.Tensor:
    """Return silu(gate) * up; x (n, 2 * width) holds [gate; up]."""
    return gated(x, "silu")


def gated(x: nn.Tensor, name: str, is_gate_first: bool = True) -> nn.Tensor:
    """Return act(gate) * up for x (n, 2 * width): [gate; up], or [up; gate]."""
    kind, width = ACTIVATIONS[name], _width(x) // 2
    kernel = kernel_of(rows.gated, known_rows(x), width, kind, is_gate_first, x.dtype)
    return _rowwise(f"{kind}_mul", kernel, [x], width)


def bounded_swiglu(x: nn.Tensor, alpha: float, limit: float) -> nn.Tensor:
    """Return what the bounded gate and up of x (n, 2 * width), [gate; up], make."""
    width = _width(x) // 2
    options = width, float(alpha), float(limit), x.dtype
    kernel = kernel_of(rows.bounded_swiglu, known_rows(x), *options)
    return _rowwise("bounded_swiglu", kernel, [x], width)


def activate(x: nn.Tensor, name: str) -> nn.Tensor:
    """Return an activation of x; name: as configurations call it."""
    kind = ACTIVATIONS[name]
    kernel = kernel_of(rows.activate, known_rows(x), _width(x), kind, x.dtype)
    return _rowwise(kind, kernel, [x], _width(x))


def scale(x: nn.Tensor, factor: float) -> nn.Tensor:
    """Return x * factor."""
    if factor == 1:
        return x
    kernel = kernel_of(rows.scale, known_rows(x), _width(x), float(factor), x.dtype)
    return _rowwise("scale", kernel, [x], _width(x))


def scale_queries(x: nn.Tensor, positions: nn.Tensor, q_width: int, scale: QueryScale) -> nn.Tensor:
    """Return rows [q; k; v] (n, width) with queries scaled by positions (n) int32."""
    kernel = kernel_of(rows.scale_queries, known_rows(x), _width(x), q_width, scale, x.dtype)
    return _rowwise("scale_queries", kernel, [x, positions], _width(x))


def clip(x: nn.Tensor, bound: float) -> nn.Tensor:
    """Return x within +-bound."""
    kernel = kernel_of(rows.clip, known_rows(x), _width(x), float(bound), x.dtype)
    return _rowwise("clip", kernel, [x], _width(x))


def soft_cap(x: nn.Tensor, cap: float) -> nn.Tensor:
    """Return cap * tanh(x / cap)."""
    kernel = kernel_of(rows.soft_cap, known_rows(x), _width(x), float(cap), x.dtype)
    return _rowwise("soft_cap", kernel, [x], _width(x))


def take_rows(x: nn.Tensor, chosen: nn.Tensor) -> nn.Tensor:
    """Return the given rows of x (n, width); chosen (r) int32."""
    kernel = kernel_of(rows.take_rows, known_rows(chosen), _width(x), x.dtype)
    taken: nn.Tensor = call("take_rows", kernel, [x, chosen], [chosen.shape[0], _width(x)], x.dtype)
    return taken


def last_row(x: nn.Tensor) -> nn.Tensor:
    """Return the last row of x (n, width), (1, width)."""
    kernel = kernel_of(rows.last_row, _width(x), x.dtype)
    row: nn.Tensor = call("last_row", kernel, [x], [1, _width(x)], x.dtype)
    return row


def rotate(
    qkv: nn.Tensor, positions: nn.Tensor, turned: int, kept: int, head_dim: int, rope_: RopeConfig
) -> nn.Tensor:
    """Return rows of `turned` heads that are rotated by their positions (n), and `kept` others."""
    frequencies = nn.Tensor.from_const(rope_.inverse_frequencies())
    shape = (turned, kept, head_dim)
    options = (2 * int(frequencies.shape[0]), rope_.is_interleaved, rope_.table_scale)
    kernel = kernel_of(rope.rotate, known_rows(qkv), shape, *options, qkv.dtype)
    return _rowwise("rotate", kernel, [qkv, positions, frequencies], _width(qkv))


def rotate_heads(
    qkv: nn.Tensor, table: nn.Tensor, heads: tuple[int, int, int], is_interleaved: bool
) -> nn.Tensor:
    """Return rows rotated by a table (n, rotary_dim) float32 of `rope_table`."""
    options = (heads, int(table.shape[1]), is_interleaved, qkv.dtype)
    kernel = kernel_of(rope.rotate_by_table, known_rows(qkv), *options)
    return _rowwise("rotate_heads", kernel, [qkv, table], _width(qkv))


def pack_linear(weight: nn.Tensor) -> nn.Tensor:
    """Return the weight: it is used as it is stored."""
    return weight


def linear_packed(
    x: nn.Tensor, packed: nn.Tensor, bias: nn.Tensor | None, out_features: int
) -> nn.Tensor:
    """Return x · weightᵀ (+ bias), (n, out)."""
    width, has_bias = _width(x), bias is not None
    options = (out_features, width, packed.dtype, x.dtype, has_bias)
    kernel = kernel_of(linear.matmul, known_rows(x), *options)
    args = [x, packed] if bias is None else [x, packed, bias]
    return _rowwise("linear", kernel, args, out_features)


def embed_packed(ids: nn.Tensor, packed: nn.Tensor, num_embeddings: int) -> nn.Tensor:
    """Return rows of a table, (n, features) of its dtype; ids (n) int32."""
    features = int(packed.shape[1])
    kernel = kernel_of(linear.embed, known_rows(ids), num_embeddings, features, packed.dtype)
    found: nn.Tensor = call("embed", kernel, [ids, packed], [ids.shape[0], features], packed.dtype)
    return found


def pack_group(
    q_weight: nn.Tensor,
    q_scale: nn.Tensor,
    form: GroupFormat,
    in_features: int,
    *,
    byte_codes: bool,
) -> tuple[nn.Tensor, nn.Tensor]:
    """Return words and scales: they are used as they are stored."""
    del in_features
    assert not byte_codes, "codes are widened for the int8 kernels of CPUs only"
    assert form.float_code is None, "8-bit floats have linears of their own"
    return q_weight, q_scale


def group_linear_packed(
    x: nn.Tensor,
    packed: tuple[nn.Tensor, nn.Tensor],
    bias: nn.Tensor | None,
    out_features: int,
    form: GroupFormat,
    int8_isa: str | None,
) -> nn.Tensor:
    """Return x · dequantized(weight)ᵀ (+ bias), (n, out)."""
    assert int8_isa is None
    options = (out_features, _width(x), form, x.dtype, bias is not None)
    kernel = kernel_of(linear.group_matmul, known_rows(x), *options)
    extra = [] if bias is None else [bias]
    return _rowwise("group_linear", kernel, [x, *packed, *extra], out_features)


def group_embed_packed(
    ids: nn.Tensor,
    packed: tuple[nn.Tensor, nn.Tensor],
    num_embeddings: int,
    features: int,
    form: GroupFormat,
) -> nn.Tensor:
    """Return dequantized rows, (n, features) of the scales' dtype; ids (n) int32."""
    kernel = kernel_of(linear.group_embed, known_rows(ids), num_embeddings, features, form)
    shape = [ids.shape[0], features]
    found: nn.Tensor = call("group_embed", kernel, [ids, *packed], shape, form.scale_dtype)
    return found
