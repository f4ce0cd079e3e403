"""What a step hands to every attention layer: where tokens stand and where K and V live.

Pages are plain tensors owned by the engine; this object only routes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.nn import ops


@dataclass
class PagedKV:
    """Step inputs, all int32, and one page tensor per layer (see `LibraryMetadata.kv_cache`)."""

    positions: nn.Tensor  # (n)
    query_start: nn.Tensor  # (b + 1)
    slots: nn.Tensor  # (n)
    page_table: nn.Tensor  # (b, p)
    context_len: nn.Tensor  # (b)
    pages: list[nn.Tensor]
    rope_table: nn.Tensor  # (n, rotary_dim) float32

    def attend(self, layer: int, qkv: nn.Tensor, shape: AttentionShape) -> nn.Tensor:
        """Write K and V of this step, attend; qkv (n, (h + 2 kv) * d) -> (n, h * d)."""
        shape = dataclasses.replace(shape, kv_dtype=self.pages[layer].dtype)
        q, self.pages[layer] = ops.rope_and_write(
            qkv, self.rope_table, self.slots, self.pages[layer], shape
        )
        return ops.paged_attention(
            q,
            self.pages[layer],
            self.query_start,
            self.page_table,
            self.context_len,
            self.positions,
            shape,
        )
