"""Operations of `recurrent_ops.py` on GPUs: each a call of the kernel for its shapes.

Rows keep the model's dtype; results of recurrences, and decays, are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.kernels.gpu import delta_rule, recurrence, recurrent_rows
from mlc_llm.nn import gpu_ops
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, kernel_of
from mlc_llm.nn.kv import PagedKV


def _advance(
    name: str,
    kernel: Any,
    args: Sequence[nn.Tensor],
    kv: PagedKV,
    state: str,
    width: int,
    dtype: str = "float32",
) -> nn.Tensor:
    """Call a recurrence on (n, ...) args and a state, written in place; return (n, width)."""
    assert kv.state_slots is not None
    before = kv.states[state]
    inputs = [*args, kv.positions, kv.query_start, kv.state_slots, before]
    out = [
        nn.Tensor.placeholder(before.shape, before.dtype),
        nn.Tensor.placeholder([args[0].shape[0], width], dtype),
    ]
    kv.states[state], result = nn.op.tensor_ir_inplace_op(
        kernel, name, inputs, [len(inputs) - 1, -1], out
    )
    return result


def token_shift(x: nn.Tensor, kv: PagedKV, state: str) -> nn.Tensor:
    """Return for each row of x (n, width) the row of the token before."""
    width = int(x.shape[1])
    kernel = kernel_of(recurrence.token_shift, width, x.dtype)
    return _advance("token_shift", kernel, [x], kv, state, width, x.dtype)


def causal_conv(x: nn.Tensor, weight: nn.Tensor, kv: PagedKV, state: str) -> nn.Tensor:
    """Return silu of the convolution over time; x (n, channels), weight (channels, 1, taps)."""
    channels, _, taps = (int(extent) for extent in weight.shape)
    kernel = kernel_of(recurrence.causal_conv, channels, taps, x.dtype, weight.dtype)
    return _advance("causal_conv", kernel, [x, weight], kv, state, channels, x.dtype)


def wkv(
    r: nn.Tensor,
    k: nn.Tensor,
    v: nn.Tensor,
    decay: nn.Tensor,
    bonus: nn.Tensor,
    kv: PagedKV,
    state: str,
    *,
    is_dynamic: bool,
) -> nn.Tensor:
    """Return RWKV's linear attention, (n, heads * size) float32."""
    num_heads, head_size = (int(extent) for extent in bonus.shape)
    options = (num_heads, head_size, r.dtype, bonus.dtype, is_dynamic)
    kernel = kernel_of(recurrence.wkv, *options)
    return _advance("wkv", kernel, [r, k, v, decay, bonus], kv, state, num_heads * head_size)


def gated_delta_rule(
    qkv: nn.Tensor,
    a: nn.Tensor,
    b: nn.Tensor,
    a_log: nn.Tensor,
    dt_bias: nn.Tensor,
    shape: DeltaShape,
    kv: PagedKV,
    state: str,
) -> nn.Tensor:
    """Return the gated delta rule, (n, heads * value_dim) float32."""
    kernel = kernel_of(delta_rule.gated_delta_rule, shape, qkv.dtype, a_log.dtype)
    args = [qkv, a, b, a_log, dt_bias]
    return _advance("gated_delta_rule", kernel, args, kv, state, shape.num_heads * shape.value_dim)


def _rowwise(
    name: str, kernel: Any, args: list[nn.Tensor], width: int, dtype: str | None = None
) -> nn.Tensor:
    shape = [args[0].shape[0], width]
    result: nn.Tensor = call(name, kernel, args, shape, dtype or args[0].dtype)
    return result


def lerp(x: nn.Tensor, y: nn.Tensor, weight: nn.Tensor) -> nn.Tensor:
    """Return x + (y - x) * weight; x, y (n, width), weight (1, 1, width)."""
    width = int(x.shape[1])
    kernel = kernel_of(recurrent_rows.lerp, known_rows(x), width, x.dtype)
    return _rowwise("lerp", kernel, [x, y, weight], width)


def low_rank_lerp(
    x: nn.Tensor, y: nn.Tensor, low: nn.Tensor, up: nn.Tensor, base: nn.Tensor, part: int
) -> nn.Tensor:
    """Return x + (y - x) * (base + low[part] · up[part]); low (n, parts * rank)."""
    num_parts, rank, width = (int(extent) for extent in up.shape)
    options = (known_rows(x), width, rank, num_parts, part, x.dtype)
    kernel = kernel_of(recurrent_rows.low_rank_lerp, *options)
    return _rowwise("low_rank_lerp", kernel, [x, y, low, up, base], width)


def linear_in_out(x: nn.Tensor, weight: nn.Tensor) -> nn.Tensor:
    """Return x · weight for a weight stored as (in, out)."""
    in_features, out_features = (int(extent) for extent in weight.shape)
    options = (known_rows(x), in_features, out_features, x.dtype)
    kernel = kernel_of(recurrent_rows.matmul_in_out, *options)
    return _rowwise("linear_in_out", kernel, [x, weight], out_features)


def tanh(x: nn.Tensor) -> nn.Tensor:
    """Return tanh of x (n, width)."""
    return gpu_ops.soft_cap(x, 1.0)


def dynamic_decay(x: nn.Tensor, base: nn.Tensor) -> nn.Tensor:
    """Return exp(-exp(base + x)), float32; x (n, width), base (1, 1, width)."""
    width = int(x.shape[1])
    kernel = kernel_of(recurrent_rows.dynamic_decay, known_rows(x), width, x.dtype, base.dtype)
    return _rowwise("decay", kernel, [x, base], width, "float32")


def static_decay(x: nn.Tensor) -> nn.Tensor:
    """Return exp(-exp(x)) of a parameter (heads, size) as (1, heads * size) float32."""
    num_heads, head_size = (int(extent) for extent in x.shape)
    kernel = kernel_of(recurrent_rows.static_decay, num_heads, head_size, x.dtype)
    decay: nn.Tensor = call("decay", kernel, [x], [1, num_heads * head_size], "float32")
    return decay


def gated_group_norm(
    x: nn.Tensor, gate: nn.Tensor, weight: nn.Tensor, bias: nn.Tensor, num_heads: int, eps: float
) -> nn.Tensor:
    """Return the group norm of each head of x (n, width) float32 times silu(gate)."""
    width = int(x.shape[1])
    sizes = (known_rows(x), num_heads, width // num_heads)
    kernel = kernel_of(recurrent_rows.gated_head_norm, *sizes, gate.dtype, weight.dtype, eps, True)
    return _rowwise("gated_norm", kernel, [x, gate, weight, bias], width, gate.dtype)


def gated_rms_norm(x: nn.Tensor, gate: nn.Tensor, weight: nn.Tensor, eps: float) -> nn.Tensor:
    """Return the norm of each head of x (n, heads * dim) float32 times weight (dim) and
    silu(gate).
    """
    width, head_dim = int(x.shape[1]), int(weight.shape[0])
    sizes = (known_rows(x), width // head_dim, head_dim)
    kernel = kernel_of(recurrent_rows.gated_head_norm, *sizes, gate.dtype, weight.dtype, eps, False)
    return _rowwise("gated_norm", kernel, [x, gate, weight], width, gate.dtype)


def sigmoid_mul(x: nn.Tensor, gate: nn.Tensor) -> nn.Tensor:
    """Return x * sigmoid(gate), both (n, width)."""
    width = int(x.shape[1])
    return _gate(x, gate, width, width, 0)


def gate_heads(x: nn.Tensor, gated: nn.Tensor, num_heads: int) -> nn.Tensor:
    """Return x (n, heads * dim) times sigmoid of the gates in `gated`, see `drop_gates`."""
    head_dim = int(x.shape[1]) // num_heads
    return _gate(x, gated, head_dim, 2 * head_dim, head_dim)


def _gate(x: nn.Tensor, gate: nn.Tensor, part: int, stride: int, offset: int) -> nn.Tensor:
    width = int(x.shape[1])
    options = (known_rows(x), width, part, stride, offset, int(gate.shape[1]), x.dtype)
    kernel = kernel_of(recurrent_rows.sigmoid_mul, *options)
    return _rowwise("sigmoid_mul", kernel, [x, gate], width)


def drop_gates(gated: nn.Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Tensor:
    """Return [q; k; v] of rows [q and gate of each head in turn; k; v]."""
    options = (known_rows(gated), num_heads, num_kv_heads, head_dim, gated.dtype)
    kernel = kernel_of(recurrent_rows.drop_gates, *options)
    return _rowwise("drop_gates", kernel, [gated], (num_heads + 2 * num_kv_heads) * head_dim)
