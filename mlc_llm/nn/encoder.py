"""What models that see a text as a whole need beside the operations of decoders."""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import encoder as kernels
from mlc_llm.nn import gpu_encoder
from mlc_llm.nn.kernel_call import on_gpu
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding
from mlc_llm.nn.ops import emit, kernel_of


def see_whole(kv: PagedKV) -> PagedKV:
    """Return what a step hands to attention, for tokens that see their whole sequence.

    It shares the pages. Each sequence must lie in the step as a whole.
    """
    ends = _last_positions(kv.query_start, kv.context_len, kv.positions)
    return dataclasses.replace(kv, positions=ends)


def add_entry(x: nn.Tensor, table: Embedding, index: int) -> nn.Tensor:
    """Return x (n, width) with one entry of a table added to every row."""
    return _add_row(x, table(nn.Tensor.from_const(np.full(1, index, np.int32))))


@on_gpu(gpu_encoder.last_positions)
def _last_positions(
    query_start: nn.Tensor, context_len: nn.Tensor, positions: nn.Tensor
) -> nn.Tensor:
    args = [query_start, context_len, positions]
    kernel = kernel_of(kernels.last_positions)
    ends: nn.Tensor = emit("last_positions", kernel, args, list(positions.shape), "int32")
    return ends


@on_gpu(gpu_encoder.add_row)
def _add_row(x: nn.Tensor, row: nn.Tensor) -> nn.Tensor:
    kernel = kernel_of(kernels.add_row, int(x.shape[1]))
    added: nn.Tensor = emit("add_row", kernel, [x, row], list(x.shape))
    return added
