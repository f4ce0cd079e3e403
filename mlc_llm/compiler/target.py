"""Targets and optimisation levels: what a library is compiled for. Does not import TVM."""

from __future__ import annotations

import sys
from typing import Any

from mlc_llm.device import host_cpu, parse_device
from mlc_llm.errors import OptionError

# Optimisation level -> LLVM's. O2 is the default everywhere.
_LLVM_LEVELS = {"O0": 0, "O1": 1, "O2": 2, "O3": 3}
# MLC LLM's switches; they steer CUDA and ROCm kernels only.
_GPU_SWITCHES = (
    "flashinfer",
    "cublas_gemm",
    "faster_transformer",
    "cudagraph",
    "cutlass",
    "ipc_allreduce_strategy",
)


def describe_target(device: str, opt: str) -> dict[str, Any]:
    """Return the TVM target and instruction sets that `device` and `opt` stand for.

    The same dictionary means the same code, so it is part of cache keys. Raises OptionError or
    DeviceError.
    """
    parse_device(device)
    cpu = host_cpu()
    target = {
        "kind": "llvm",
        "mtriple": _triple(cpu.arch),
        "mcpu": cpu.name,
        "mattr": cpu.llvm_features,
        "opt-level": parse_opt(opt),
    }
    return {"target": target, "isa": [cpu.arch, *cpu.isa]}


def parse_opt(opt: str) -> int:
    """Return LLVM's optimisation level for `--opt`. Raises OptionError."""
    if opt in _LLVM_LEVELS:
        return _LLVM_LEVELS[opt]
    switches = [part.partition("=")[0].strip() for part in opt.split(";")]
    if all(name in _GPU_SWITCHES for name in switches):
        raise OptionError(
            f"--opt {opt}: {', '.join(switches)} has no effect on cpu; use O0, O1, O2 or O3"
        )
    raise OptionError(f"--opt {opt!r} is not known; use one of {', '.join(_LLVM_LEVELS)}")


def _triple(arch: str) -> str:
    if sys.platform == "darwin":
        return f"{'arm64' if arch == 'aarch64' else arch}-apple-macosx"
    if sys.platform == "win32":
        return f"{arch}-pc-windows-msvc"
    return f"{arch}-unknown-linux-gnu"
