"""Pages of the KV cache as bookkeeping: who uses them, and which are kept for later prompts.

Knows numbers only; the tensors belong to the runner.

    take            share                       give_back
    free ──▶ in use ◀──────── idle (kept, nobody uses it)
      ▲        │ ▲               ▲ │
      └────────┘ └── give_back ──┘ └──▶ reclaimed, oldest first, when free ones run out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mlc_llm.errors import RequestError


class PagePool:
    """Counts the users of each page.

    A page nobody uses is free, or idle if it was kept: its content may be shared again. Idle pages
    are given out when free ones run out, least recently used first; `on_reclaim(page)` tells.
    At most `max_idle` pages are idle; None sets no limit.
    """

    def __init__(self, num_pages: int, page_size: int, max_idle: int | None = None) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.on_reclaim: Callable[[int], None] = lambda page: None
        self._max_idle = num_pages if max_idle is None else max_idle
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_users = [0] * num_pages
        self._is_kept = bytearray(num_pages)
        self._idle: dict[int, None] = {}  # oldest first

    @property
    def num_free(self) -> int:
        """Pages that hold nothing of use."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Pages that nobody uses but whose content is kept."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that somebody uses."""
        return self.num_pages - self.num_available

    def take(self, count: int) -> list[int]:
        """Hand out pages, each with one user. Raises RequestError where there are not enough."""
        if count > self.num_available:
            raise RequestError(
                f"the KV cache is full: {count} pages wanted, {self.num_available} of "
                f"{self.num_pages} free"
            )
        while len(self._free) < count:
            self._reclaim_oldest()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._num_users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a user to pages that are in use or idle."""
        for page in pages:
            if self._num_users[page] == 0:
                del self._idle[page]
            self._num_users[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Remove a user from pages in the order of their tokens; later ones go first when idle."""
        for page in reversed(pages):
            self._num_users[page] -= 1
            if self._num_users[page] == 0:
                if self._is_kept[page]:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        while len(self._idle) > self._max_idle:
            self._reclaim_oldest()

    def is_used(self, page: int) -> bool:
        """Return whether somebody uses the page."""
        return self._num_users[page] > 0

    def is_shared(self, page: int) -> bool:
        """Return whether more than one user has the page, so that none may write it."""
        return self._num_users[page] > 1

    def keep(self, page: int) -> None:
        """Let a page that is in use become idle, not free, when its last user leaves."""
        self._is_kept[page] = 1

    def forget(self, page: int) -> None:
        """Undo `keep`; an idle page becomes free."""
        self._is_kept[page] = 0
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def _reclaim_oldest(self) -> None:
        page = next(iter(self._idle))
        self.on_reclaim(page)
        self.forget(page)

    def check_integrity(self, used: Iterable[Sequence[int]]) -> None:
        """Assert that users are counted right and every page is free, idle or in use, once."""
        users = [0] * self.num_pages
        for pages in used:
            for page in pages:
                users[page] += 1
        assert users == self._num_users, "a page has more or fewer users than are counted"
        unused = [page for page, count in enumerate(users) if count == 0]
        assert sorted([*self._free, *self._idle]) == unused, "a page is lost or counted twice"
        assert all(self._is_kept[page] for page in self._idle), "an idle page is not kept"
        assert not any(self._is_kept[page] for page in self._free), "a free page is kept"
