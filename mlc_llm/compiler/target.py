"""Targets and optimisation levels: what a library is compiled for. Does not import TVM."""

from __future__ import annotations

import sys
from typing import Any

from mlc_llm.device import TargetCPU, host_cpu, parse_target
from mlc_llm.errors import OptionError

# Optimisation level -> LLVM's. O2 is the default everywhere.
_LLVM_LEVELS = {"O0": 0, "O1": 1, "O2": 2, "O3": 3}
# What linears multiply: int8 is faster, float32 keeps activations exact. With int8, bfloat16
# weights, which no int8 can stand for, meet bfloat16 activations where the CPU has the instruction.
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
    cpu = parse_target(device)
    level, activations = parse_opt(opt)
    target = {
        "kind": "llvm",
        "mtriple": triple_of(cpu),
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


def triple_of(cpu: TargetCPU) -> str:
    """Return the LLVM triple of a CPU under the system of this machine; Apple's run macOS."""
    if sys.platform == "darwin" or cpu.name.startswith("apple-"):
        return f"{'arm64' if cpu.arch == 'aarch64' else cpu.arch}-apple-macosx"
    if sys.platform == "win32":
        return f"{cpu.arch}-pc-windows-msvc"
    return f"{cpu.arch}-unknown-linux-gnu"


def host_triple() -> str:
    """Return the LLVM triple of this machine."""
    return triple_of(host_cpu().target)
