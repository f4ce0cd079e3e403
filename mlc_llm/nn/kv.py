"""What a step hands to every attention layer: where tokens stand and where K and V live.

Pages are plain tensors owned by the engine; this object only routes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.nn import ops, row_ops


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of a step's positions, (n, rotary_dim) float32."""

    table: nn.Tensor
    is_interleaved: bool


@dataclass
class PagedKV:
    """Step inputs, all int32, and one page tensor per layer (see `LibraryMetadata.kv_cache`).

    states: those of recurrent layers by name, (slots, ...); a layer puts the written one back.
    """

    positions: nn.Tensor  # (n)
    query_start: nn.Tensor  # (b + 1)
    slots: nn.Tensor  # (n)
    page_table: nn.Tensor  # (b, p)
    context_len: nn.Tensor  # (b)
    pages: list[nn.Tensor]
    ropes: list[RopeTable]
    state_slots: nn.Tensor | None = None  # (b)
    states: dict[str, nn.Tensor] = field(default_factory=dict)

    def rotate(self, qkv: nn.Tensor, shape: AttentionShape, rope: int = 0) -> nn.Tensor:
        """Return [q; k; v] with q and k turned, for layers that do more before they attend."""
        heads = (shape.num_heads + shape.num_kv_heads, shape.num_kv_heads, shape.head_dim)
        found = self.ropes[rope]
        return row_ops.rotate_heads(qkv, found.table, heads, found.is_interleaved)

    def attend(
        self,
        layer: int,
        qkv: nn.Tensor,
        shape: AttentionShape,
        rope: int | None = 0,
        sink_logits: nn.Tensor | None = None,
    ) -> nn.Tensor:
        """Write K and V of this step, attend; qkv (n, (h + 2 kv) * d) -> (n, h * d).

        rope: which of `ropes` turns queries and keys, None for none. sink_logits (h): a score more
        in the softmax of each head, which has no value.
        """
        shape = dataclasses.replace(shape, kv_dtype=self.pages[layer].dtype)
        table, is_interleaved = None, False
        if rope is not None:
            table, is_interleaved = self.ropes[rope].table, self.ropes[rope].is_interleaved
        q, self.pages[layer] = ops.rope_and_write(
            qkv, table, self.slots, self.pages[layer], shape, is_interleaved
        )
        return ops.paged_attention(
            q,
            self.pages[layer],
            self.query_start,
            self.page_table,
            self.context_len,
            self.positions,
            shape,
            sink_logits,
        )
