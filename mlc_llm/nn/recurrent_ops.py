"""Operations of recurrent layers, each a call of the kernel for its shape.

Like `ops.py`; those for GPUs are in `gpu_recurrent.py`. Operations that carry a state from token to
token take the step and the state's name (see `PagedKV.states`) and write the state in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import delta_rule, linear, recurrence, recurrent_rows
from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.nn import gpu_recurrent
from mlc_llm.nn.kernel_call import on_gpu
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.ops import emit, kernel_of, linear_packed


def _advance(
    name: str, kernel: Any, args: Sequence[nn.Tensor], kv: PagedKV, state: str, width: int
) -> nn.Tensor:
    """Call a recurrence on (n, ...) args and a state; return (n, width) float32."""
    assert kv.state_slots is not None
    before = kv.states[state]
    inputs = [*args, kv.positions, kv.query_start, kv.state_slots, before]
    out = [
        nn.Tensor.placeholder(before.shape, before.dtype),
        nn.Tensor.placeholder([args[0].shape[0], width], "float32"),
    ]
    kv.states[state], result = nn.op.tensor_ir_inplace_op(
        kernel, name, inputs, [len(inputs) - 1, -1], out
    )
    return result


@on_gpu(gpu_recurrent.token_shift)
def token_shift(x: nn.Tensor, kv: PagedKV, state: str) -> nn.Tensor:
    """Return for each row of x (n, width) the row of the token before."""
    width = int(x.shape[1])
    kernel = kernel_of(recurrence.token_shift, width)
    return _advance("token_shift", kernel, [x], kv, state, width)


@on_gpu(gpu_recurrent.causal_conv)
def causal_conv(x: nn.Tensor, weight: nn.Tensor, kv: PagedKV, state: str) -> nn.Tensor:
    """Return silu of the convolution over time; x (n, channels), weight (channels, 1, taps)."""
    channels, _, taps = (int(extent) for extent in weight.shape)
    kernel = kernel_of(recurrence.causal_conv, channels, taps, weight.dtype)
    return _advance("causal_conv", kernel, [x, weight], kv, state, channels)


@on_gpu(gpu_recurrent.wkv)
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
    """Return RWKV's linear attention, (n, heads * size).

    decay: of `dynamic_decay`, one row a token, or of `static_decay`, one row for all.
    """
    num_heads, head_size = (int(extent) for extent in bonus.shape)
    kernel = kernel_of(recurrence.wkv, num_heads, head_size, bonus.dtype, is_dynamic)
    return _advance("wkv", kernel, [r, k, v, decay, bonus], kv, state, num_heads * head_size)


@on_gpu(gpu_recurrent.gated_delta_rule)
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
    """Return the gated delta rule, (n, heads * value_dim); see the kernel of that name."""
    kernel = kernel_of(delta_rule.gated_delta_rule, shape, a_log.dtype)
    args = [qkv, a, b, a_log, dt_bias]
    return _advance("gated_delta_rule", kernel, args, kv, state, shape.num_heads * shape.value_dim)


@on_gpu(gpu_recurrent.lerp)
def lerp(x: nn.Tensor, y: nn.Tensor, weight: nn.Tensor) -> nn.Tensor:
    """Return x + (y - x) * weight; x, y (n, width), weight (1, 1, width)."""
    kernel = kernel_of(recurrent_rows.lerp, int(x.shape[1]), weight.dtype)
    return emit("lerp", kernel, [x, y, weight], x.shape)


@on_gpu(gpu_recurrent.low_rank_lerp)
def low_rank_lerp(
    x: nn.Tensor, y: nn.Tensor, low: nn.Tensor, up: nn.Tensor, base: nn.Tensor, part: int
) -> nn.Tensor:
    """Return x + (y - x) * (base + low[part] · up[part]); low (n, parts * rank)."""
    num_parts, rank, width = (int(extent) for extent in up.shape)
    kernel = kernel_of(recurrent_rows.low_rank_lerp, width, rank, num_parts, part, up.dtype)
    return emit("low_rank_lerp", kernel, [x, y, low, up, base], x.shape)


@on_gpu(gpu_recurrent.linear_in_out)
def linear_in_out(x: nn.Tensor, weight: nn.Tensor) -> nn.Tensor:
    """Return x · weight for a weight stored as (in, out)."""
    in_features, out_features = (int(extent) for extent in weight.shape)
    kernel = kernel_of(linear.interleave, out_features, in_features, weight.dtype, True)
    shape = list(linear.packed_shape(out_features, in_features))
    packed = emit("pack_linear", kernel, [weight], shape, weight.dtype)
    return linear_packed(x, packed, None, out_features)


@on_gpu(gpu_recurrent.tanh)
def tanh(x: nn.Tensor) -> nn.Tensor:
    """Return tanh of x (n, width)."""
    return emit("tanh", kernel_of(recurrent_rows.tanh, int(x.shape[1])), [x], x.shape)


@on_gpu(gpu_recurrent.dynamic_decay)
def dynamic_decay(x: nn.Tensor, base: nn.Tensor) -> nn.Tensor:
    """Return exp(-exp(base + x)); x (n, width), base (1, 1, width)."""
    kernel = kernel_of(recurrent_rows.dynamic_decay, int(x.shape[1]), base.dtype)
    return emit("decay", kernel, [x, base], x.shape)


@on_gpu(gpu_recurrent.static_decay)
def static_decay(x: nn.Tensor) -> nn.Tensor:
    """Return exp(-exp(x)) of a parameter (heads, size) as (1, heads * size) float32."""
    num_heads, head_size = (int(extent) for extent in x.shape)
    kernel = kernel_of(recurrent_rows.static_decay, num_heads, head_size, x.dtype)
    return emit("decay", kernel, [x], [1, num_heads * head_size])


@on_gpu(gpu_recurrent.gated_group_norm)
def gated_group_norm(
    x: nn.Tensor, gate: nn.Tensor, weight: nn.Tensor, bias: nn.Tensor, num_heads: int, eps: float
) -> nn.Tensor:
    """Return the group norm of each head times silu(gate); all (n, width), weight (width)."""
    args = (num_heads, int(x.shape[1]) // num_heads, weight.dtype, eps, True)
    kernel = kernel_of(recurrent_rows.gated_head_norm, *args)
    return emit("gated_norm", kernel, [x, gate, weight, bias], x.shape)


@on_gpu(gpu_recurrent.gated_rms_norm)
def gated_rms_norm(x: nn.Tensor, gate: nn.Tensor, weight: nn.Tensor, eps: float) -> nn.Tensor:
    """Return the norm of each head times weight (dim) and silu(gate); x (n, heads * dim)."""
    head_dim = int(weight.shape[0])
    bias = nn.op.astype(nn.Tensor.from_const(np.zeros(head_dim, np.float32)), weight.dtype)
    args = (int(x.shape[1]) // head_dim, head_dim, weight.dtype, eps, False)
    kernel = kernel_of(recurrent_rows.gated_head_norm, *args)
    return emit("gated_norm", kernel, [x, gate, weight, bias], x.shape)


@on_gpu(gpu_recurrent.sigmoid_mul)
def sigmoid_mul(x: nn.Tensor, gate: nn.Tensor) -> nn.Tensor:
    """Return x * sigmoid(gate), both (n, width)."""
    width = int(x.shape[1])
    kernel = kernel_of(recurrent_rows.sigmoid_mul, 1, width, 0, 0, width)
    return emit("sigmoid_mul", kernel, [x, gate], x.shape)


@on_gpu(gpu_recurrent.gate_heads)
def gate_heads(x: nn.Tensor, gated: nn.Tensor, num_heads: int) -> nn.Tensor:
    """Return x (n, heads * dim) times sigmoid of the gates in `gated`, see `drop_gates`."""
    head_dim = int(x.shape[1]) // num_heads
    args = (num_heads, head_dim, 2 * head_dim, head_dim, int(gated.shape[1]))
    return emit("gate_heads", kernel_of(recurrent_rows.sigmoid_mul, *args), [x, gated], x.shape)


@on_gpu(gpu_recurrent.drop_gates)
def drop_gates(gated: nn.Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Tensor:
    """Return [q; k; v] of rows [q and gate of each head in turn; k; v]."""
    kernel = kernel_of(recurrent_rows.drop_gates, num_heads, num_kv_heads, head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    return emit("drop_gates", kernel, [gated], [gated.shape[0], width])
