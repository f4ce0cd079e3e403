"""The tree of prompt pages: what is found again, what is not, and what is forgotten."""

from __future__ import annotations

import random

import pytest

from mlc_llm.engine.prefix_cache import PrefixCache
from mlc_llm.runtime.pages import PagePool

SIZE = 4


def store(cache: PrefixCache, pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Compute a prompt as a sequence would, and leave it; returns the pages it used."""
    pages, node = cache.match(tokens, salt)
    pool.share(pages)
    pages = pages + pool.take(-(-len(tokens) // SIZE) - len(pages))
    known = len(cache.match(tokens, salt)[0])
    for number in range(known, len(tokens) // SIZE):
        child = cache.insert(node, tokens[number * SIZE : (number + 1) * SIZE], pages[number])
        assert child is not None
        node = child
    pool.give_back(pages)
    cache.check_integrity()
    return pages


def test_longest_beginning_of_whole_pages_is_found() -> None:
    pool = PagePool(8, SIZE)
    cache = PrefixCache(pool)
    pages = store(cache, pool, list(range(10)))
    assert cache.match(list(range(10)), "")[0] == pages[:2]
    assert cache.match(list(range(7)), "")[0] == pages[:1]
    assert cache.match([0, 1, 2, 3, 9, 9, 9, 9], "")[0] == pages[:1]
    assert cache.match([0, 1, 2], "")[0] == []
    assert cache.match([4, 5, 6, 7], "")[0] == []


def test_salts_share_nothing() -> None:
    pool = PagePool(8, SIZE)
    cache = PrefixCache(pool)
    store(cache, pool, list(range(8)), "a")
    assert cache.match(list(range(8)), "b")[0] == []
    assert len(cache.match(list(range(8)), "a")[0]) == 2


def test_roots_of_forgotten_salts_do_not_pile_up() -> None:
    pool = PagePool(4, SIZE)
    cache = PrefixCache(pool)
    for number in range(100):
        store(cache, pool, [number] * SIZE, f"salt {number}")
    assert len(cache._roots) <= pool.num_pages + 1


def test_reclaimed_page_takes_what_follows_it() -> None:
    pool = PagePool(4, SIZE)
    cache = PrefixCache(pool)
    pages = store(cache, pool, list(range(12)))
    # Keep the end in use by itself: its beginning is then the oldest idle page.
    pool.share(pages[2:])
    pool.take(3)
    assert cache.match(list(range(12)), "")[0] == []
    assert cache.num_pages == 0
    cache.check_integrity()
    pool.give_back(pages[2:])
    assert pool.num_free == 1 and pool.num_idle == 0


def test_equal_page_is_not_stored_twice() -> None:
    pool = PagePool(4, SIZE)
    cache = PrefixCache(pool)
    first, second = pool.take(1), pool.take(1)
    tokens = [1, 2, 3, 4]
    node = cache.insert(cache.root(""), tokens, first[0])
    assert cache.insert(cache.root(""), tokens, second[0]) is node
    pool.give_back(second)
    assert pool.num_free == 3
    assert cache.match(tokens, "")[0] == first


def test_nothing_is_stored_after_a_node_that_is_gone() -> None:
    pool = PagePool(2, SIZE)
    cache = PrefixCache(pool)
    pages = pool.take(1)
    node = cache.insert(cache.root(""), [1, 2, 3, 4], pages[0])
    assert node is not None
    cache.clear()
    assert cache.insert(node, [5, 6, 7, 8], pool.take(1)[0]) is None
    assert cache.num_pages == 0
    cache.check_integrity()


def test_clearing_forgets_all_but_leaves_used_pages_to_their_users() -> None:
    pool = PagePool(6, SIZE)
    cache = PrefixCache(pool)
    pages = store(cache, pool, list(range(8)))
    pool.share(pages)
    root = cache.root("")
    cache.clear()
    assert pool.num_used == 2
    pool.give_back(pages)
    assert pool.num_free == 6
    # A sequence that began before goes on and is found again.
    (page,) = pool.take(1)
    assert cache.insert(root, [7, 7, 7, 7], page) is not None
    assert cache.match([7, 7, 7, 7], "")[0] == [page]
    assert cache.match(list(range(8)), "")[0] == []
    cache.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_prompts_find_what_a_set_of_beginnings_finds(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(16, SIZE)
    cache = PrefixCache(pool)
    content: dict[int, tuple[int, ...]] = {}  # page -> tokens up to its end
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 30))]
        found, _ = cache.match(tokens, "")
        for number, page in enumerate(found, 1):
            assert content[page] == tuple(tokens[: number * SIZE])
        for number, page in enumerate(store(cache, pool, tokens), 1):
            content[page] = tuple(tokens[: number * SIZE])
        assert len(cache.match(tokens, "")[0]) == len(tokens) // SIZE
        pool.check_integrity([])
