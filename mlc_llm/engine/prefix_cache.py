"""Which pages hold which tokens: a tree that finds the pages of a prompt's beginning.

Knows tokens and page numbers; when a page is given up is the pool's business (least recently used
first), and the tree only hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlc_llm.runtime.pages import PagePool


@dataclass(eq=False)
class PrefixNode:
    """One page of tokens after those of its parents; the root of a salt has no page (None)."""

    page: int | None
    parent: PrefixNode | None
    tokens: tuple[int, ...]
    salt: str
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)


class PrefixCache:
    """A radix tree over tokens whose edges are whole pages.

    Requests with different salts never share pages, so that nobody can learn from the time to the
    first token what others have asked. `on_lost(node)` tells what is in the tree no more.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._roots: dict[str, PrefixNode] = {}
        self._node_of_page: dict[int, PrefixNode] = {}
        self.on_lost: Callable[[PrefixNode], None] = lambda node: None
        pool.on_reclaim = self._remove

    def root(self, salt: str) -> PrefixNode:
        """Return where the prompts of a salt begin."""
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = PrefixNode(None, None, (), salt)
        return node

    def match(self, tokens: Sequence[int], salt: str) -> tuple[list[int], PrefixNode]:
        """Return the pages of the longest known beginning and its node.

        The pages may be given up at the next `take`: share them before.
        """
        node = self.root(salt)
        pages: list[int] = []
        size = self._pool.page_size
        for start in range(0, len(tokens) - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            assert child.page is not None
            pages.append(child.page)
            node = child
        return pages, node

    def insert(self, node: PrefixNode, tokens: Sequence[int], page: int) -> PrefixNode | None:
        """Remember that `page`, in use now, holds `tokens` after those of `node`.

        Returns the node to go on from, which may be that of an equal page, or None where `node` is
        no longer in the tree.
        """
        if not self.is_attached(node):
            return None
        key = tuple(tokens)
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = PrefixNode(page, node, key, node.salt)
            self._node_of_page[page] = child
            self._pool.keep(page)
        return child

    def is_attached(self, node: PrefixNode) -> bool:
        """Return whether a node is in the tree still."""
        if node.page is None:  # an empty root was dropped, and may come back
            return self._roots.setdefault(node.salt, node) is node
        return self._node_of_page.get(node.page) is node

    def clear(self) -> None:
        """Forget everything; pages in use stay with their users."""
        for page, node in self._node_of_page.items():
            self._pool.forget(page)
            self.on_lost(node)
        self._node_of_page.clear()
        for root in self._roots.values():
            root.children.clear()  # running sequences may hold on to it
        self._roots.clear()

    @property
    def num_pages(self) -> int:
        """Pages in the tree, in use or idle."""
        return len(self._node_of_page)

    def _remove(self, page: int) -> None:
        """Take a page out of the tree, and what follows it, which nobody could find any more."""
        node = self._node_of_page[page]
        assert node.parent is not None
        del node.parent.children[node.tokens]
        for lost in _subtree(node):
            assert lost.page is not None
            del self._node_of_page[lost.page]
            self.on_lost(lost)
            if lost is not node:
                self._pool.forget(lost.page)
        if node.parent.page is None and not node.parent.children:
            del self._roots[node.salt]

    def check_integrity(self) -> None:
        """Assert that the tree and the index of its pages agree."""
        found = {
            node.page: node
            for root in self._roots.values()
            for node in _subtree(root)
            if node is not root
        }
        assert found == self._node_of_page, "the tree and the index of its pages differ"


def _subtree(node: PrefixNode) -> Iterator[PrefixNode]:
    pending = [node]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(current.children.values())
