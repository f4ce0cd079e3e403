"""Normalisation layers."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.nn import ops
from mlc_llm.nn.ops import Rows


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter((hidden_size,), dtype)

    def forward(self, x: nn.Tensor) -> Rows:
        """Return the normalised (n, hidden) float32, computed where they are used."""
        return ops.rms_norm(x, self.weight, self.eps)
