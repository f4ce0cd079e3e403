"""Feed-forward layers."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.nn import row_ops
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.ops import Rows


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up fused along the output (Shazeer 2020).

    names: attributes, so parameter names, of the two linears.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        dtype: str,
        bias: bool = False,
        activation: str = "silu",
        names: tuple[str, str] = ("gate_up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.activation, self.names = activation, names
        setattr(self, names[0], Linear(hidden_size, 2 * intermediate_size, dtype, bias))
        setattr(self, names[1], Linear(intermediate_size, hidden_size, dtype, bias))

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        gate_up, down = (getattr(self, name) for name in self.names)
        out: nn.Tensor = down(row_ops.gated(gate_up(x), self.activation))
        return out


class MLP(nn.Module):
    """down(act(up(x))); names: attributes, so parameter names, of the two linears."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        dtype: str,
        activation: str,
        names: tuple[str, str],
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.names = activation, names
        setattr(self, names[0], Linear(hidden_size, intermediate_size, dtype, bias))
        setattr(self, names[1], Linear(intermediate_size, hidden_size, dtype, bias))

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        up, down = (getattr(self, name) for name in self.names)
        out: nn.Tensor = down(row_ops.activate(up(x), self.activation))
        return out
