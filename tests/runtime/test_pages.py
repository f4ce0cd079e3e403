"""Pages as bookkeeping: random operations against invariants."""

from __future__ import annotations

import numpy as np
import pytest

from mlc_llm.errors import RequestError
from mlc_llm.runtime.pages import PagedSequence, PagePool


def check(pool: PagePool, sequences: list[PagedSequence]) -> None:
    pool.check_integrity([sequence.pages for sequence in sequences])
    owned = sum(len(sequence.pages) for sequence in sequences)
    assert pool.num_free + owned == pool.num_pages
    for sequence in sequences:
        assert len(sequence.pages) == -(-len(sequence.token_ids) // pool.page_size)


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_every_page(seed) -> None:
    rng = np.random.default_rng(seed)
    pool = PagePool(12, 4)
    sequences = [PagedSequence(pool) for _ in range(4)]
    contents: list[list[int]] = [[] for _ in sequences]
    # What lies in each slot, as a runner would write it.
    memory = np.full(12 * 4, -1)
    for number in range(400):
        index = int(rng.integers(4))
        sequence, content = sequences[index], contents[index]
        if rng.random() < 0.6:
            tokens = [number * 10 + i for i in range(int(rng.integers(1, 9)))]
            needed = -(-(len(content) + len(tokens)) // 4) - len(sequence.pages)
            if needed > pool.num_free:
                before = list(sequence.pages)
                with pytest.raises(RequestError, match="KV cache is full"):
                    sequence.grow(tokens)
                assert sequence.pages == before
            else:
                memory[sequence.grow(tokens)] = tokens
                content += tokens
        else:
            length = int(rng.integers(0, len(content) + 1))
            sequence.truncate(length)
            del content[length:]
        check(pool, sequences)
        for other, expected in zip(sequences, contents, strict=True):
            assert other.token_ids == expected
            places = np.arange(len(expected))
            slots = np.asarray(other.pages, int)[places // 4] * 4 + places % 4
            assert memory[slots].tolist() == expected
    for sequence in sequences:
        sequence.truncate(0)
    assert pool.num_free == 12


def test_slots_go_on_where_the_last_page_has_room() -> None:
    pool = PagePool(4, 4)
    first, second = PagedSequence(pool), PagedSequence(pool)
    assert first.grow([1, 2, 3]).tolist() == [0, 1, 2]
    assert second.grow([9]).tolist() == [4]
    slots = first.grow([4, 5])
    assert slots.tolist() == [3, 8] and slots.dtype == np.int32
    first.truncate(4)
    assert first.grow([6]).tolist() == [8]


def test_full_pool_says_so_and_takes_nothing() -> None:
    pool = PagePool(2, 4)
    with pytest.raises(RequestError, match="3 pages wanted, 2 of 2 free"):
        pool.take(3)
    assert pool.num_free == 2


def test_integrity_check_finds_lost_and_doubled_pages() -> None:
    pool = PagePool(3, 4)
    pages = pool.take(2)
    for owned in ([], [pages, pages], [pages[:1]]):
        with pytest.raises(AssertionError, match="lost or owned twice"):
            pool.check_integrity(owned)
    pool.check_integrity([pages])
