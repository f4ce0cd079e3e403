"""Mixtures of experts: linear layers of many experts, and the feed-forward layers made of them."""

from __future__ import annotations

from collections.abc import Callable

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.nn import expert_ops
from mlc_llm.nn.expert_ops import Routes
from mlc_llm.nn.ops import Rows


class Experts(nn.Module):
    """The same linear layer of every expert; weight (experts, out, in), bias (experts, out).

    Only the weights of routed experts are read.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, dtype: str, bias: bool = False
    ) -> None:
        super().__init__()
        self.num_experts, self.dtype_name = num_experts, dtype
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter((num_experts, out_features, in_features), dtype)
        self.bias = nn.Parameter((num_experts, out_features), dtype) if bias else None

    def forward(self, x: nn.Tensor | Rows, routes: Routes, is_pairs: bool = False) -> nn.Tensor:
        """Return (n * top_k, out) float32, a row a pair of a token and one of its experts.

        x: float32, a row a token (n, in), or a row a pair if is_pairs.
        """
        packed = expert_ops.pack_experts(self.weight)
        y = expert_ops.experts_packed(x, packed, routes, self.out_features, is_pairs)
        return y if self.bias is None else expert_ops.add_expert_bias(y, self.bias, routes)


class GroupQuantizedExperts(nn.Module):
    """Experts whose weights are stored as `q_weight` and `q_scale`, (experts, out, ...).

    int8_isa: instruction set of the kernel for int8 activations, None for float32 activations.
    """

    def __init__(self, experts: Experts, form: GroupFormat, int8_isa: str | None) -> None:
        super().__init__()
        assert not form.is_transposed
        self.in_features, self.out_features = experts.in_features, experts.out_features
        self.form, self.int8_isa = form, int8_isa
        groups = form.num_groups(self.in_features)
        rows = (experts.num_experts, self.out_features)
        self.q_weight = nn.Parameter((*rows, groups * form.words_per_group), "uint32")
        self.q_scale = nn.Parameter((*rows, groups * form.scales_per_group), form.scale_dtype)
        self.bias = experts.bias

    def forward(self, x: nn.Tensor | Rows, routes: Routes, is_pairs: bool = False) -> nn.Tensor:
        """Return (n * top_k, out) float32, see `Experts`."""
        byte_codes = self.int8_isa is not None
        packed = expert_ops.pack_expert_groups(
            self.q_weight, self.q_scale, self.form, self.in_features, byte_codes
        )
        form = self.form.with_byte_codes() if byte_codes else self.form
        y = expert_ops.expert_groups_packed(
            x, packed, routes, self.out_features, form, self.int8_isa, is_pairs
        )
        return y if self.bias is None else expert_ops.add_expert_bias(y, self.bias, routes)


def mix_experts(
    x: nn.Tensor | Rows,
    routes: Routes,
    gate_up: nn.Module,
    down: nn.Module,
    activate: Callable[[nn.Tensor], nn.Tensor | Rows],
) -> nn.Tensor:
    """Return the weighted sum of down(activate(gate_up(x))) of each token's experts, (n, hidden).

    Shazeer et al. 2017; gate_up and down are `Experts`.
    """
    return expert_ops.mix(down(activate(gate_up(x, routes)), routes, is_pairs=True), routes)
