"""Operations of `expert_ops.py` on GPUs: each a call of the kernel for its shapes.

Rows keep the model's dtype, weights are used as the artifact stores them.
"""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.kernels.gpu import experts, routing
from mlc_llm.kernels.gpu.expert_weights import ExpertWeights
from mlc_llm.nn.gpu_attention import block_limits
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, kernel_of
from mlc_llm.nn.routes import Routes


def route(logits: nn.Tensor, routing_: Routing, bias: nn.Tensor | None = None) -> Routes:
    """Choose experts for logits (n, experts); bias (experts) changes the choice alone."""
    n, top_k, num_experts = logits.shape[0], routing_.top_k, routing_.num_experts
    bias_dtype = None if bias is None else bias.dtype
    chosen, weights = nn.op.tensor_ir_op(
        kernel_of(routing.route, routing_, logits.dtype, bias_dtype),
        "route",
        [logits] if bias is None else [logits, bias],
        [nn.Tensor.placeholder([n, top_k], t) for t in ("int32", "float32")],
    )
    plan_size = num_experts + 1 + routing.num_tiles(n * top_k, num_experts)
    order, plan = nn.op.tensor_ir_op(
        kernel_of(routing.order_by_expert, num_experts, top_k, routing.few_tokens(routing_)),
        "order_by_expert",
        [chosen],
        [nn.Tensor.placeholder([size], "int32") for size in (n * top_k, plan_size)],
    )
    return Routes(routing_, chosen, weights, order, plan)


def weigh(y: nn.Tensor, routes: Routes) -> nn.Tensor:
    """Return y (n * top_k, width), a row a pair, with each row times its weight."""
    kernel = kernel_of(
        routing.weigh, known_rows(routes.chosen), routes.routing.top_k, int(y.shape[1]), y.dtype
    )
    weighed: nn.Tensor = call("weigh", kernel, [y, routes.weights], y.shape, y.dtype)
    return weighed


def mix(y: nn.Tensor, routes: Routes, is_weighted: bool = True) -> nn.Tensor:
    """Return the weighted sums (n, width) of what a token's experts made of it; y has its pairs."""
    width = int(y.shape[1])
    options = routes.routing.top_k, width, y.dtype, is_weighted
    kernel = kernel_of(routing.mix, known_rows(routes.chosen), *options)
    shape = [routes.chosen.shape[0], width]
    mixed: nn.Tensor = call("mix", kernel, [y, routes.weights], shape, y.dtype)
    return mixed


def scale_by_sigmoid(x: nn.Tensor, logits: nn.Tensor) -> nn.Tensor:
    """Return x * sigmoid(logits); x (n, width), logits (n, 1)."""
    kernel = kernel_of(routing.scale_by_sigmoid, known_rows(x), int(x.shape[1]), x.dtype)
    scaled: nn.Tensor = call("scale_by_sigmoid", kernel, [x, logits], x.shape, x.dtype)
    return scaled


def pack_experts(weight: nn.Tensor) -> nn.Tensor:
    """Return the weight: it is used as it is stored."""
    return weight


def pack_expert_groups(
    q_weight: nn.Tensor, q_scale: nn.Tensor, form: GroupFormat, in_features: int, byte_codes: bool
) -> tuple[nn.Tensor, nn.Tensor]:
    """Return words and scales: they are used as they are stored. Raises UnsupportedModel."""
    del in_features
    assert not byte_codes, "codes are widened for the int8 kernels of CPUs only"
    if form.float_code is not None or form.has_minimum or form.high_bits:
        raise UnsupportedModel(
            "the weights of its experts are in a format that GPU kernels do not read yet; convert "
            "it to q4f16_1 or q8f16_1"
        )
    return q_weight, q_scale


def experts_packed(
    x: nn.Tensor, packed: nn.Tensor, routes: Routes, out_features: int, is_pairs: bool
) -> nn.Tensor:
    """Return the products of pairs with their experts' weights, (n * top_k, out).

    x: (n, in), or (n * top_k, in) if is_pairs.
    """
    shape = routes.routing.num_experts, out_features, int(x.shape[1])
    weights = ExpertWeights(*shape, packed.dtype)
    return _multiply("expert_linear", x, weights, [packed], routes, is_pairs)


def expert_groups_packed(
    x: nn.Tensor,
    packed: tuple[nn.Tensor, nn.Tensor],
    routes: Routes,
    out_features: int,
    form: GroupFormat,
    int8_isa: str | None,
    is_pairs: bool,
) -> nn.Tensor:
    """Return what `experts_packed` does, for words and scales."""
    assert int8_isa is None
    shape = routes.routing.num_experts, out_features, int(x.shape[1])
    weights = ExpertWeights(*shape, form.scale_dtype, form)
    return _multiply("expert_group_linear", x, weights, list(packed), routes, is_pairs)


def _multiply(
    name: str,
    x: nn.Tensor,
    weights: ExpertWeights,
    stored: list[nn.Tensor],
    routes: Routes,
    is_pairs: bool,
) -> nn.Tensor:
    options = routes.routing, is_pairs, x.dtype, block_limits().load_bytes
    args = [x, *stored, routes.chosen, routes.order, routes.plan]
    shape = [routes.order.shape[0], weights.out_features]
    product: nn.Tensor = call(
        name, kernel_of(experts.matmul, weights, *options), args, shape, x.dtype
    )
    return product


def add_expert_bias(y: nn.Tensor, bias: nn.Tensor, routes: Routes) -> nn.Tensor:
    """Return y (n * top_k, out) plus the bias (experts, out) of each pair's expert."""
    num_experts, width = (int(extent) for extent in bias.shape)
    options = num_experts, routes.routing.top_k, width, y.dtype
    kernel = kernel_of(routing.add_expert_bias, known_rows(routes.chosen), *options)
    args = [y, routes.chosen, bias]
    added: nn.Tensor = call("add_expert_bias", kernel, args, y.shape, y.dtype)
    return added
