"""A sequence's tokens in pages, for tests that call a runner without the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlc_llm.runtime.pages import PagePool


@dataclass
class PagedSequence:
    """Tokens whose K and V are in pages, in order; token i lies in slot_of(i)."""

    pool: PagePool
    token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def grow(self, token_ids: list[int]) -> NDArray[np.int32]:
        """Append tokens and return their slots (n) int32. Raises RequestError when full."""
        size = self.pool.page_size
        start = len(self.token_ids)
        needed = -(-(start + len(token_ids)) // size)
        self.pages.extend(self.pool.take(max(0, needed - len(self.pages))))
        self.token_ids.extend(token_ids)
        places = np.arange(start, len(self.token_ids))
        pages = np.asarray(self.pages, np.int32)
        return (pages[places // size] * size + places % size).astype(np.int32)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on and give back pages that hold none."""
        del self.token_ids[length:]
        keep = -(-length // self.pool.page_size)
        self.pool.give_back(self.pages[keep:])
        del self.pages[keep:]
