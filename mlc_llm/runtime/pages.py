"""Pages of the KV cache as bookkeeping: which are free, and where a sequence's tokens live.

Knows numbers only; the tensors belong to the runner.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import RequestError


@dataclass
class PagePool:
    """Free pages; each page is owned by one sequence."""

    num_pages: int
    page_size: int
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Return how many pages nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out pages. Raises RequestError where there are not enough."""
        if count > len(self._free):
            raise RequestError(
                f"the KV cache is full: {count} pages wanted, {len(self._free)} of "
                f"{self.num_pages} free"
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Take pages back; the caller no longer uses them."""
        self._free.extend(reversed(pages))

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Assert that free and owned pages are all pages, each once."""
        everything = sorted([*self._free, *(page for pages in owned for page in pages)])
        assert everything == list(range(self.num_pages)), "a page is lost or owned twice"


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
