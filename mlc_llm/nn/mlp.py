"""Feed-forward layers."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.nn import row_ops
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.ops import Rows


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up fused along the output (Shazeer 2020)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        dtype: str,
        bias: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, dtype, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        return self.down_proj(row_ops.gated(self.gate_up_proj(x), self.activation))
