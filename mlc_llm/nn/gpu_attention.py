"""Attention of `ops.py` on GPUs: each operation a call of the kernels for its shapes."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.target import Target

from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu import attention, attention_pages, int8_pages, rope
from mlc_llm.kernels.gpu.attention_scores import BlockLimits
from mlc_llm.kernels.gpu.attention_single import scratch_width
from mlc_llm.kernels.gpu.tensor_cores import tensor_cores
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, gpu_kind, kernel_of

# What kinds of GPU have more of than all must have.
_LIMITS: dict[str | None, BlockLimits] = {
    "cuda": BlockLimits(shared_bytes=49152, load_bytes=16, max_parts=32),
    "rocm": BlockLimits(shared_bytes=32768, max_parts=32),
    "metal": BlockLimits(shared_bytes=32768),
    "opencl": BlockLimits(shared_bytes=32768),
}


def block_limits() -> BlockLimits:
    """Return what a block of threads has on the GPU that is compiled for."""
    return _LIMITS.get(gpu_kind(), BlockLimits())


def rope_table(positions: nn.Tensor, frequencies: nn.Tensor, scale: float) -> nn.Tensor:
    """Return cosines and sines, (n, 2 * len(frequencies)) float32; positions (n) int32."""
    rotary_dim = 2 * int(frequencies.shape[0])
    kernel = kernel_of(rope.rope_table, known_rows(positions), rotary_dim, scale)
    shape = [positions.shape[0], rotary_dim]
    table: nn.Tensor = call("rope_table", kernel, [positions, frequencies], shape, "float32")
    return table


def rope_and_write(
    qkv: nn.Tensor,
    table: nn.Tensor | None,
    slots: nn.Tensor,
    pages: nn.Tensor,
    shape: AttentionShape,
    is_interleaved: bool = False,
) -> tuple[nn.Tensor, nn.Tensor]:
    """Rotate q and k, write k and v into `pages` in place; return q and the same pages."""
    kernels = int8_pages if shape.is_int8 else attention_pages
    q = nn.Tensor.placeholder([qkv.shape[0], shape.num_heads, shape.head_dim], qkv.dtype)
    out = [nn.Tensor.placeholder(pages.shape, pages.dtype), q]
    if table is None:
        kernel, args = kernel_of(kernels.write, shape, qkv.dtype), [qkv, slots, pages]
    else:
        options = int(table.shape[1]), is_interleaved, qkv.dtype
        kernel = kernel_of(kernels.rope_and_write, shape, *options)
        args = [qkv, table, slots, pages]
    written, rotated = nn.op.tensor_ir_inplace_op(
        kernel, "rope_and_write", args, [len(args) - 1, -1], out
    )
    return rotated, written


def paged_attention(
    q: nn.Tensor,
    pages: nn.Tensor,
    query_start: nn.Tensor,
    page_table: nn.Tensor,
    context_len: nn.Tensor,
    positions: nn.Tensor,
    shape: AttentionShape,
    sink_logits: nn.Tensor | None = None,
) -> nn.Tensor:
    """Return causal attention over the pages of each token's sequence, (n, heads * head_dim)."""
    del context_len  # the last position says it
    limits = block_limits()
    sink_dtype = None if sink_logits is None else sink_logits.dtype
    cores = tensor_cores(str(Target.current().attrs["arch"])) if gpu_kind() == "cuda" else None
    kernel = kernel_of(attention.paged_attention, shape, q.dtype, sink_dtype, limits, cores)
    args: list[Any] = [q, pages, query_start, page_table, positions]
    if sink_logits is not None:
        args.append(sink_logits)
    batch, heads, width = page_table.shape[0], shape.num_heads, scratch_width(shape)
    scratch = nn.Tensor.placeholder([batch, heads, limits.max_parts, width], "float32")
    out = nn.Tensor.placeholder([q.shape[0], heads * shape.head_dim], q.dtype)
    _, attended = nn.op.tensor_ir_op(kernel, "paged_attention", args, [scratch, out])
    result: nn.Tensor = attended
    return result


def copy_pages(pages: nn.Tensor, sources: nn.Tensor, targets: nn.Tensor) -> nn.Tensor:
    """Copy pages of a layer in place, and return them; sources, targets (m) int32."""
    kv_heads, page_items = int(pages.shape[2]), int(pages.shape[3])
    kernel = kernel_of(attention_pages.copy_pages, kv_heads, page_items, pages.dtype)
    out = nn.Tensor.placeholder(pages.shape, pages.dtype)
    copied: nn.Tensor = nn.op.tensor_ir_inplace_op(
        kernel, "copy_pages", [pages, sources, targets], [0], out
    )
    return copied
