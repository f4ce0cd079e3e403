"""Compiles single kernels and runs them on NumPy arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlc_llm.compiler.target import describe_target
from mlc_llm.runtime.memory import aligned_zeros, as_aligned, as_tensor

# Elements after an output that a kernel must leave alone.
GUARD = 64

Kernel = Callable[..., NDArray[np.float32]]


def build_kernel(func: Any, device: str = "cpu") -> Kernel:
    """Compile a PrimFunc whose last argument is its output.

    device: what the code is made for; this CPU must be able to run it.

    The result is called with the input arrays (one that is aligned is written in place) and the
    keyword `shape` of the output, float32 unless `dtype` says otherwise.
    """
    import tvm

    target = tvm.target.Target(describe_target(device, "O2")["target"])
    module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
    function = tvm.compile(module, target=target)["f"]

    def call(
        *inputs: NDArray[Any], shape: tuple[int, ...], dtype: Any = np.float32
    ) -> NDArray[np.float32]:
        size = int(np.prod(shape))
        memory = aligned_zeros((size + GUARD,), dtype)
        # What is not written stays at a value that no test expects.
        memory[...] = 113
        out = memory[:size].reshape(shape)
        function(*(as_tensor(as_aligned(array)) for array in inputs), as_tensor(out))
        assert (memory[size:] == 113).all(), "the kernel wrote behind its output"
        return out

    return call


@pytest.fixture(scope="session")
def build() -> Callable[[Any], Kernel]:
    """Return the compiler of kernels."""
    return build_kernel


@pytest.fixture(scope="session")
def build_for() -> Callable[[str], Callable[[Any], Kernel]]:
    """Return a function from a device to the compiler of kernels for it."""
    return lambda device: functools.partial(build_kernel, device=device)


@pytest.fixture
def rng() -> np.random.Generator:
    """Return random numbers that are the same in every run."""
    return np.random.default_rng(11)
