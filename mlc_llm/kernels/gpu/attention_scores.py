"""What one score of attention is, and what a kind of GPU gives a block of threads for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape

LOG2_E = math.log2(math.e)
# The score of a key that is not seen; half of it is far below all others.
MASKED = -1e30


@dataclass(frozen=True)
class BlockLimits:
    """What one block may use: threads, bytes of shared memory, bytes that a thread loads at once.

    max_parts: into how many parts the keys of a single token are dealt, at most.
    """

    threads: int = 128
    shared_bytes: int = 16384
    load_bytes: int = 8
    max_parts: int = 16

    def lanes(self, dtype: str, head_dim: int) -> int:
        """Return how many items of a head a thread loads at once."""
        size = 2 if dtype in ("float16", "int8") else 4  # eight codes are enough for a thread
        # No language but CUDA has vectors of eight.
        return math.gcd(max(4, self.load_bytes // size), head_dim)


def finish_score(shape: AttentionShape, product: Any, head: Any, key: Any, position: Any) -> Any:
    """Return a score as a power of two: scaled, capped, lowered by distance."""
    score = product * T.float32(shape.query_scale)
    if shape.soft_cap > 0:
        # tanh(x) = 1 - 2 / (e**2x + 1); far out the power is bounded, where tanh is 1 already.
        power = T.exp2(T.min(score * T.float32(2 / shape.soft_cap * LOG2_E), T.float32(100)))
        cap = shape.soft_cap * LOG2_E
        score = T.float32(cap) - T.float32(2 * cap) / (power + T.float32(1))
    if shape.alibi:
        distance = T.Cast("float32", key - position)
        score = score + distance * _alibi_slope(head, shape.num_heads)
    return score


def _alibi_slope(head: Any, num_heads: int) -> Any:
    # Press et al. 2022, section 3: a geometric series; where the number of heads is no power of
    # two, every second term of the next longer one follows.
    whole = 2 ** int(math.log2(num_heads))
    number = T.if_then_else(head < whole, 2 * (head + 1), 2 * (head - whole) + 1)
    return T.exp2(T.Cast("float32", number) * T.float32(-4 / whole)) * T.float32(LOG2_E)


def with_sink(total: Any, maximum: Any, sink_logits: Any, head: Any, sink_dtype: str | None) -> Any:
    """Return the sum of a softmax's powers with that of the head's sink logit, if it has one."""
    if sink_dtype is None:
        return total
    power = T.Cast("float32", sink_logits[head]) * T.float32(LOG2_E) - maximum
    # Beside a power of 100 all others are nothing; a larger one would overflow.
    return total + T.exp2(T.min(power, T.float32(100)))


def weight(score: Any, maximum: Any) -> Any:
    """Return the power of a score below its maximum, 0 for a key that is not seen."""
    return T.Select(score > T.float32(MASKED / 2), T.exp2(score - maximum), T.float32(0))
