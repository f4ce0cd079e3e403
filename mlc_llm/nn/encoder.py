"""What models that see a text as a whole need beside the operations of decoders."""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import encoder as kernels
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding
from mlc_llm.nn.ops import emit, kernel_of


def see_whole(kv: PagedKV) -> PagedKV:
    """Return what a step hands to attention, for tokens that see their whole sequence.

    It shares the pages. Each sequence must lie in the step as a whole.
    """
    args = [kv.query_start, kv.context_len, kv.positions]
    kernel = kernel_of(kernels.last_positions)
    ends = emit("last_positions", kernel, args, list(kv.positions.shape), "int32")
    return dataclasses.replace(kv, positions=ends)


def add_entry(x: nn.Tensor, table: Embedding, index: int) -> nn.Tensor:
    """Return x (n, width) float32 with one entry of a table added to every row."""
    row = table(nn.Tensor.from_const(np.full(1, index, np.int32)))
    return emit("add_row", kernel_of(kernels.add_row, int(x.shape[1])), [x, row], x.shape)
