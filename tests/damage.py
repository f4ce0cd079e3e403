"""Damage files in reproducible ways, and hold what reads them to errors of ours and to limits."""

import copy
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

from mlc_llm.errors import MlcError

MAX_SECONDS_EACH = 2.0  # of a processor: one that waits for ever meets the limit of all tests
MAX_BYTES = 32 << 20


def damaged_copies(
    whole: bytes, seed: int, rounds: int, reach: int | None = None
) -> Iterator[bytes]:
    """Yield damaged copies of a file: cut off, bits flipped, bytes replaced, parts lost or twice.

    reach: bytes from the begin in which most of the damage happens; the rest has values, not form.
    """
    rng = random.Random(seed)
    reach = reach or len(whole)
    for number in range(rounds):
        damaged = bytearray(whole)
        match number % 6:
            case 0:
                del damaged[rng.randrange(len(whole)) :]
            case 1 | 2:
                for _ in range(rng.randint(1, 4)):
                    damaged[rng.randrange(reach)] ^= 1 << rng.randrange(8)
            case 3:
                at = rng.randrange(reach)
                size = rng.choice((1, 2, 4, 8))
                damaged[at : at + size] = bytes(rng.choice((0, 255, 127)) for _ in range(size))
            case 4:
                at = rng.randrange(reach)
                del damaged[at : at + rng.randint(1, 16)]
            case _:
                at = rng.randrange(reach)
                damaged[at:at] = damaged[at : at + rng.randint(1, 16)]
        yield bytes(damaged)


# What may stand in JSON where something else should.
_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 60, -(1 << 70), 0.5, 1e308, float("nan")),
    *("", "x", "../x", "\0", "é" * 300, [], [[]], [1, 2], {}, {"a": {}}, ["x"], [None]),
)


def damaged_json(value: Any, seed: int, rounds: int) -> Iterator[bytes]:
    """Yield JSON texts in which one to three values are strange, missing, or there twice."""
    rng = random.Random(seed)
    for _ in range(rounds):
        changed = copy.deepcopy(value)
        for _ in range(rng.randint(1, 3)):
            places = list(_places(changed))
            if not places:
                break
            owner, key = rng.choice(places)
            if rng.random() < 0.15:
                del owner[key]
            elif rng.random() < 0.1 and isinstance(owner, list):
                owner.append(copy.deepcopy(owner[key]))
            else:
                owner[key] = copy.deepcopy(rng.choice(_STRANGE))
        yield json.dumps(changed).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from _places(value[key])


def count_refusals(copies: Iterator[bytes], use: Callable[[bytes], None]) -> int:
    """Return how many copies `use` refused with an error of ours.

    Any other error fails the test, and so does one that takes long or much memory.
    """
    refused = 0
    tracemalloc.start()
    try:
        for number, copy in enumerate(copies):
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            start = time.process_time()
            try:
                use(copy)
            except MlcError as error:
                refused += 1
                assert len(str(error)) < 2000, f"copy {number}: a message nobody reads"
            peak = tracemalloc.get_traced_memory()[1] - held
            assert peak < MAX_BYTES, f"copy {number} took {peak:,} bytes"
            assert time.process_time() - start < MAX_SECONDS_EACH, f"copy {number} took too long"
    finally:
        tracemalloc.stop()
    return refused
