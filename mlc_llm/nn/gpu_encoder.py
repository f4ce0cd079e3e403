"""Operations of `encoder.py` on GPUs: each a call of the kernel for its shapes."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.kernels.gpu import encoder
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, kernel_of


def last_positions(
    query_start: nn.Tensor, context_len: nn.Tensor, positions: nn.Tensor
) -> nn.Tensor:
    """Return the position of the last token of each token's sequence, (n) int32."""
    args = [query_start, context_len, positions]
    kernel = kernel_of(encoder.last_positions)
    ends: nn.Tensor = call("last_positions", kernel, args, list(positions.shape), "int32")
    return ends


def add_row(x: nn.Tensor, row: nn.Tensor) -> nn.Tensor:
    """Return x (n, width) with row (1, width) added to all."""
    kernel = kernel_of(encoder.add_row, known_rows(x), int(x.shape[1]), x.dtype)
    added: nn.Tensor = call("add_row", kernel, [x, row], list(x.shape), x.dtype)
    return added
