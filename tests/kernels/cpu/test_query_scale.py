"""Queries scaled by their positions, against the formula in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlc_llm.kernels.cpu.query_scale import QueryScale, scale_queries

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("q_width", "width"), [(32, 48), (18, 25)])
@pytest.mark.parametrize("scale", [QueryScale(0.1, 8, 1), QueryScale(0.3, 5)])
def test_queries_grow_in_steps(
    build: Any, rng: np.random.Generator, scale: QueryScale, q_width: int, width: int
) -> None:
    kernel = build(scale_queries(scale, q_width, width))
    positions = np.asarray([0, 3, 4, 5, 7, 8, 9, 39, 40, 8191, 8192, 10_000_000, 15], np.int32)
    x = rng.standard_normal((len(positions), width)).astype(np.float32)
    steps = np.floor((positions + scale.offset) / scale.period)
    expected = x.astype(np.float64)
    expected[:, :q_width] *= (1 + scale.strength * np.log(1 + steps))[:, None]
    found = kernel(x, positions, shape=x.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[:, q_width:], x[:, q_width:])
    for rows in (slice(0, 1), slice(2, 9)):
        alone = kernel(x[rows], positions[rows], shape=x[rows].shape)
        np.testing.assert_array_equal(alone, found[rows])
