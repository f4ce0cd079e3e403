"""Operations of mixtures of experts, each a call of the kernel for its shape; like `ops.py`."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import expert_linear, group_linear, linear, routing
from mlc_llm.kernels.cpu.activations import Int8Shape
from mlc_llm.kernels.cpu.expert_linear import ExpertShape
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.kernels.cpu.vector_math import LANES
from mlc_llm.nn import gpu_experts
from mlc_llm.nn.kernel_call import on_gpu
from mlc_llm.nn.ops import (
    Rows,
    emit,
    extents,
    kernel_of,
    materialize,
    quantize_activations,
    shared_rows,
)
from mlc_llm.nn.routes import Routes as Routes


@on_gpu(gpu_experts.route)
def route(logits: nn.Tensor, routing_: Routing, bias: nn.Tensor | None = None) -> Routes:
    """Choose experts for logits (n, experts) float32; bias (experts) changes the choice alone."""
    n, top_k = logits.shape[0], routing_.top_k
    kernel = kernel_of(routing.route, routing_, None if bias is None else bias.dtype)
    chosen, weights = nn.op.tensor_ir_op(
        kernel,
        "route",
        [logits] if bias is None else [logits, bias],
        [nn.Tensor.placeholder([n, top_k], t) for t in ("int32", "float32")],
    )
    order, plan = nn.op.tensor_ir_op(
        kernel_of(routing.order_by_expert, routing_.num_experts, top_k),
        "order_by_expert",
        [chosen],
        [
            nn.Tensor.placeholder([n * top_k], "int32"),
            nn.Tensor.placeholder([2 * routing_.num_experts + 2], "int32"),
        ],
    )
    return Routes(routing_, chosen, weights, order, plan)


@on_gpu(gpu_experts.weigh)
def weigh(y: nn.Tensor, routes: Routes) -> nn.Tensor:
    """Return y (n * top_k, width), a row a pair, with each row times its weight."""
    kernel = kernel_of(routing.weigh, routes.routing.top_k, int(y.shape[1]))
    return emit("weigh", kernel, [y, routes.weights], y.shape)


@on_gpu(gpu_experts.mix)
def mix(y: nn.Tensor, routes: Routes, is_weighted: bool = True) -> nn.Tensor:
    """Return the weighted sums (n, width) of what a token's experts made of it; y has its pairs.

    is_weighted: False where `weigh` came before.
    """
    width = int(y.shape[1])
    kernel = kernel_of(routing.mix, routes.routing.top_k, width, is_weighted)
    return emit("mix", kernel, [y, routes.weights], [routes.chosen.shape[0], width])


@on_gpu(gpu_experts.scale_by_sigmoid)
def scale_by_sigmoid(x: nn.Tensor, logits: nn.Tensor) -> nn.Tensor:
    """Return x * sigmoid(logits); x (n, width), logits (n, 1), both float32."""
    kernel = kernel_of(routing.scale_by_sigmoid, int(x.shape[1]))
    return emit("scale_by_sigmoid", kernel, [x, logits], x.shape)


@on_gpu(gpu_experts.pack_experts)
def pack_experts(weight: nn.Tensor) -> nn.Tensor:
    """Return an (experts, out, in) weight in the kernel's layout; lifted into `pack_params`."""
    return _interleave("pack_experts", weight)


def _interleave(name: str, array: nn.Tensor) -> nn.Tensor:
    experts, rows, columns = (int(extent) for extent in array.shape)
    kernel = kernel_of(linear.interleave, rows, columns, array.dtype, False, experts)
    shape = [experts * linear.num_blocks(rows), columns, LANES]
    return emit(name, kernel, [array], shape, array.dtype)


@on_gpu(gpu_experts.pack_expert_groups)
def pack_expert_groups(
    q_weight: nn.Tensor, q_scale: nn.Tensor, form: GroupFormat, in_features: int, byte_codes: bool
) -> tuple[nn.Tensor, nn.Tensor]:
    """Return portable words and scales (experts, out, ...) packed; see `ops.pack_group`."""
    packed_scales = _interleave("pack_scales", q_scale)
    wide = form.with_byte_codes()
    if not byte_codes or wide == form:
        return _interleave("pack_words", q_weight), packed_scales
    experts, rows, _ = (int(extent) for extent in q_weight.shape)
    kernel = kernel_of(group_linear.widen_codes, rows, in_features, form, experts)
    shape = list(wide.word_shape(experts * linear.num_blocks(rows) * LANES, in_features))
    return emit("pack_words", kernel, [q_weight], shape, "uint32"), packed_scales


@on_gpu(gpu_experts.experts_packed)
def experts_packed(
    x: nn.Tensor | Rows, packed: nn.Tensor, routes: Routes, out_features: int, is_pairs: bool
) -> nn.Tensor:
    """Return the products of pairs with their experts' weights, (n * top_k, out) float32.

    x: float32, (n, in), or (n * top_k, in) if is_pairs. packed: by `pack_experts`.
    """
    x = materialize(x)
    shape = _shape_of(x, routes, out_features, is_pairs)
    kernel = kernel_of(expert_linear.matmul, shape, packed.dtype, shared_rows())
    return _emit_pairs("expert_linear", kernel, [x, packed], routes, out_features)


@on_gpu(gpu_experts.expert_groups_packed)
def expert_groups_packed(
    x: nn.Tensor | Rows,
    packed: tuple[nn.Tensor, nn.Tensor],
    routes: Routes,
    out_features: int,
    form: GroupFormat,
    int8_isa: str | None,
    is_pairs: bool,
) -> nn.Tensor:
    """Return what `experts_packed` does, for weights packed by `pack_expert_groups`.

    int8_isa: the instruction set for int8 activations, or None for float32 ones.
    """
    shape = _shape_of(x, routes, out_features, is_pairs)
    if int8_isa is None:
        kernel = kernel_of(expert_linear.group_matmul, shape, form, shared_rows())
        return _emit_pairs(
            "expert_group_linear", kernel, [materialize(x), *packed], routes, out_features
        )
    kernel = kernel_of(expert_linear.int8_matmul, shape, form, int8_isa)
    quantized = quantize_activations(x, Int8Shape(out_features, shape.in_features, form, int8_isa))
    return _emit_pairs("expert_int8_linear", kernel, [quantized, *packed], routes, out_features)


@on_gpu(gpu_experts.add_expert_bias)
def add_expert_bias(y: nn.Tensor, bias: nn.Tensor, routes: Routes) -> nn.Tensor:
    """Return y (n * top_k, out) plus the bias (experts, out) of each pair's expert."""
    experts, width = (int(extent) for extent in bias.shape)
    kernel = kernel_of(routing.add_expert_bias, experts, routes.routing.top_k, width, bias.dtype)
    return emit("add_expert_bias", kernel, [y, routes.chosen, bias], y.shape)


def _shape_of(
    x: nn.Tensor | Rows, routes: Routes, out_features: int, is_pairs: bool
) -> ExpertShape:
    pairs_per_row = 1 if is_pairs else routes.routing.top_k
    return ExpertShape(routes.routing.num_experts, out_features, extents(x)[1], pairs_per_row)


def _emit_pairs(
    name: str, kernel: Any, args: list[Any], routes: Routes, out_features: int
) -> nn.Tensor:
    args = [*args, routes.order, routes.plan]
    return emit(name, kernel, args, [routes.order.shape[0], out_features])
