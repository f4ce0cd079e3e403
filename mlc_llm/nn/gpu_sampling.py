"""Operations from logits to tokens on GPUs, each a call of its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.kernels.gpu import sampling, sorting
from mlc_llm.nn.kernel_call import call, kernel_of


def change_logits(factory: Callable[[], Any], logits: nn.Tensor, *args: nn.Tensor) -> nn.Tensor:
    """Return logits (b, v) that a kernel of `kernels.gpu.sampling` has changed in place."""
    changed: nn.Tensor = nn.op.tensor_ir_inplace_op(
        kernel_of(factory), factory.__name__, [logits, *args], [0], logits
    )
    return changed


def softmax_with_temperature(logits: nn.Tensor, temperature: nn.Tensor) -> nn.Tensor:
    """Return probabilities (b, 1, v) float32; temperature (b), above 0."""
    kernel = kernel_of(sampling.softmax_with_temperature)
    probabilities: nn.Tensor = call(
        "softmax_with_temperature", kernel, [logits, temperature], logits.shape, "float32"
    )
    return probabilities


def sort_falling(probs: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Return (b, v) float32 sorted along rows, the largest first, and where items were, int32."""
    width, run = int(probs.shape[1]), sorting.RUN
    results = (
        nn.Tensor.placeholder(probs.shape, "float32"),
        nn.Tensor.placeholder(probs.shape, "int32"),
    )
    kernel = kernel_of(sorting.sort_runs, width)
    sorted_ = nn.op.tensor_ir_op(kernel, "sort_runs", [probs], results)
    while run < width:
        kernel = kernel_of(sorting.merge_runs, width, run)
        sorted_ = nn.op.tensor_ir_op(kernel, "merge_runs", list(sorted_), results)
        run *= 2
    return sorted_[0], sorted_[1]


def sample_with_top_p(
    probs: nn.Tensor, order: nn.Tensor, uniform: nn.Tensor, rows: nn.Tensor, top_p: nn.Tensor
) -> nn.Tensor:
    """Return tokens (s) int32, see the kernel."""
    kernel = kernel_of(sampling.sample_with_top_p)
    args = [probs, order, uniform, rows, top_p]
    drawn: nn.Tensor = call("sample_with_top_p", kernel, args, [uniform.shape[0]], "int32")
    return drawn
