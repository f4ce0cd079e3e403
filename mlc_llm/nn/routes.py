"""Where the tokens of a step go: what routing hands to the layers of experts."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.routing import Routing


@dataclass(frozen=True)
class Routes:
    """Chosen experts (n, top_k) int32 and their weights, float32.

    order and plan, both int32: see `order_by_expert` of `kernels.cpu.routing`, or of
    `kernels.gpu.routing`.
    """

    routing: Routing
    chosen: nn.Tensor
    weights: nn.Tensor
    order: nn.Tensor
    plan: nn.Tensor
