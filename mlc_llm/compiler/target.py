"""Targets and optimisation levels: what a library is compiled for. Does not import TVM."""

from __future__ import annotations

import sys
from typing import Any

from mlc_llm.device import host_cpu, parse_device
from mlc_llm.errors import OptionError

# Optimisation level -> LLVM's. O2 is the default everywhere.
_LLVM_LEVELS = {"O0": 0, "O1": 1, "O2": 2, "O3": 3}
# What quantized linears multiply: int8 is faster, float32 keeps activations exact.
ACTIVATIONS = ("int8", "float32")
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
    """Return the TVM target, instruction sets and kernel choices for `device` and `opt`.

    The same dictionary means the same code, so it is part of cache keys. Raises OptionError or
    DeviceError.
    """
    parse_device(device)
    cpu = host_cpu()
    level, activations = parse_opt(opt)
    target = {
        "kind": "llvm",
        "mtriple": _triple(cpu.arch),
        "mcpu": cpu.name,
        "mattr": cpu.llvm_features,
        "opt-level": level,
    }
    return {"target": target, "isa": [cpu.arch, *cpu.isa], "activations": activations}


def parse_opt(opt: str) -> tuple[int, str]:
    """Return LLVM's level and the dtype of activations for `--opt`. Raises OptionError.

    Written as a level, `O0` to `O3`, and settings after semicolons: `O2;activations=float32`.
    """
    level, activations = "O2", "int8"
    for part in filter(None, (part.strip() for part in opt.split(";"))):
        name, _, value = part.partition("=")
        if part in _LLVM_LEVELS:
            level = part
        elif name == "activations" and value in ACTIVATIONS:
            activations = value
        elif name in _GPU_SWITCHES:
            raise OptionError(f"--opt {part}: {name} has no effect on cpu; leave it out")
        else:
            raise OptionError(
                f"--opt {part!r} is not known; use {', '.join(_LLVM_LEVELS)} and "
                f"activations={'|'.join(ACTIVATIONS)}, as in 'O2;activations=float32'"
            )
    return _LLVM_LEVELS[level], activations


def _triple(arch: str) -> str:
    if sys.platform == "darwin":
        return f"{'arm64' if arch == 'aarch64' else arch}-apple-macosx"
    if sys.platform == "win32":
        return f"{arch}-pc-windows-msvc"
    return f"{arch}-unknown-linux-gnu"
