"""The child process that measures the bandwidth."""

from __future__ import annotations

from contextlib import closing

import pytest

from mlc_llm.bench.bandwidth import BandwidthMeter
from mlc_llm.errors import MlcError


def test_the_bandwidth_is_that_of_memory() -> None:
    with closing(BandwidthMeter(2)) as meter:
        found = [meter.read_gb_s() for _ in range(2)]
    # From a slow board to a large server; caches alone would be above.
    assert all(0.5 < gb_s < 5000 for gb_s in found)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_more_threads_than_cores_take_turns(num_threads: int) -> None:
    with closing(BandwidthMeter(num_threads)) as meter:
        # Reading alone would do for a figure; comparing unequal halves would end at once.
        assert 0.5 < meter.read_gb_s() < 5000


def test_a_child_that_is_gone_is_an_error() -> None:
    with closing(BandwidthMeter(1)) as meter:
        meter._process.kill()
        meter._process.wait()
        with pytest.raises(MlcError, match="measures the memory bandwidth ended with code -9"):
            meter.read_gb_s()


def test_closing_ends_the_child() -> None:
    meter = BandwidthMeter(1)
    meter.close()
    assert meter._process.poll() is not None
