"""Pages as bookkeeping: random operations against invariants, and a model of them in plain sets."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mlc_llm.errors import RequestError
from mlc_llm.runtime.pages import PagePool


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_keep_every_page(seed: int) -> None:
    rng = random.Random(seed)
    max_idle = rng.choice([None, 0, 3])
    pool = PagePool(12, 4, max_idle)
    reclaimed: list[int] = []
    pool.on_reclaim = reclaimed.append
    users: list[list[int]] = []
    kept: set[int] = set()
    for _ in range(600):
        reclaimed.clear()
        used = {page for pages in users for page in pages}
        action = rng.random()
        if action < 0.35:
            count = rng.randint(0, 4)
            if count > 12 - len(used):
                with pytest.raises(RequestError, match="KV cache is full"):
                    pool.take(count)
            else:
                pages = pool.take(count)
                assert len(set(pages)) == count and not used & set(pages)
                kept -= set(pages)
                users.append(pages)
        elif action < 0.5 and users:
            pages = list(rng.choice(users))
            pool.share(pages)
            users.append(pages)
        elif action < 0.6:
            idle = sorted(kept - used)
            pages = rng.sample(idle, rng.randint(0, len(idle)))
            pool.share(pages)
            users.append(pages)
        elif action < 0.75 and used:
            page = rng.choice(sorted(used))
            pool.keep(page)
            kept.add(page)
        elif users:
            pool.give_back(users.pop(rng.randrange(len(users))))
        kept -= set(reclaimed)
        pool.check_integrity(users)
        used = {page for pages in users for page in pages}
        assert pool.num_used == len(used)
        assert pool.num_idle == len(kept - used)
        assert pool.num_available == 12 - len(used)
        assert max_idle is None or pool.num_idle <= max_idle
        counts = Counter(page for pages in users for page in pages)
        for page in range(12):
            assert pool.is_shared(page) == (counts[page] > 1)
            assert pool.is_used(page) == (counts[page] > 0)
    for pages in users:
        pool.give_back(pages)
    assert pool.num_available == 12


def test_least_recently_used_pages_go_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4, 4)
    reclaimed: list[int] = []
    pool.on_reclaim = reclaimed.append
    first, second = pool.take(2), pool.take(2)
    for page in (*first, *second):
        pool.keep(page)
    pool.give_back(second)
    pool.give_back(first)
    pool.share(second[:1])
    pool.give_back(second[:1])  # used again: now the newest
    taken = [pool.take(1)[0] for _ in range(4)]
    assert reclaimed == taken == [second[1], first[1], first[0], second[0]]


def test_full_pool_says_so_and_takes_nothing() -> None:
    pool = PagePool(2, 4)
    with pytest.raises(RequestError, match="3 pages wanted, 2 of 2 free"):
        pool.take(3)
    assert pool.num_free == 2


def test_forgotten_page_is_free_again() -> None:
    pool = PagePool(2, 4)
    (page,) = pool.take(1)
    pool.keep(page)
    pool.give_back([page])
    assert (pool.num_free, pool.num_idle) == (1, 1)
    pool.forget(page)
    assert (pool.num_free, pool.num_idle) == (2, 0)
    pool.check_integrity([])


def test_integrity_check_finds_lost_and_doubled_pages() -> None:
    pool = PagePool(3, 4)
    pages = pool.take(2)
    for used in ([], [pages, pages], [pages[:1]]):
        with pytest.raises(AssertionError, match="more or fewer users"):
            pool.check_integrity(used)
    pool.check_integrity([pages])
