"""How layers call kernels, and the fork between kernels for CPUs and for GPUs.

A function of `ops.py` or `row_ops.py` chooses a CPU kernel; `on_gpu` names the function that takes
its place where a GPU is compiled for. Knows no kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from tvm.relax.frontend import nn
from tvm.target import Target

from mlc_llm.errors import UnsupportedModel

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def kernel_of(factory: Callable[..., Any], *args: Hashable) -> Any:
    """Return factory(*args); equal layers share it."""
    return factory(*args)


def call(name: str, kernel: Any, args: list[Any], shape: list[Any], dtype: str) -> Any:
    """Return the result, of that shape and dtype, of a kernel's call."""
    return nn.op.tensor_ir_op(kernel, name, args, nn.Tensor.placeholder(shape, dtype))


def gpu_kind() -> str | None:
    """Return the kind of GPU that is compiled for, None for a CPU."""
    target = Target.current(allow_none=True)
    return None if target is None or target.kind.name == "llvm" else str(target.kind.name)


def require_cpu(name: str) -> None:
    """Raise UnsupportedModel where a GPU is compiled for: the kernel `name` is for CPUs."""
    if (kind := gpu_kind()) is not None:
        raise UnsupportedModel(
            f"its layers need {name!r}, which is there for CPUs and not yet for {kind}"
        )


def on_gpu(gpu_function: Callable[..., Any]) -> Callable[[Function], Function]:
    """Return a decorator: on GPUs a call goes to `gpu_function`, with the same arguments."""

    def choose(function: Function) -> Function:
        @functools.wraps(function)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            taken = function if gpu_kind() is None else gpu_function
            return taken(*args, **kwargs)

        return cast(Function, chosen)

    return choose
