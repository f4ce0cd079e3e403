"""Targets and optimisation levels: what a library is compiled for, and in which forms.

Does not import TVM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlc_llm.compiler.gpu_targets import COMPILED_ONLY, gpu_target
from mlc_llm.device import TargetCPU, host_cpu, parse_device, parse_target
from mlc_llm.errors import OptionError

# Optimisation level -> LLVM's. O2 is the default everywhere.
_LLVM_LEVELS = {"O0": 0, "O1": 1, "O2": 2, "O3": 3}
# What linears multiply: int8 is faster, float32 keeps activations exact. With int8, bfloat16
# weights, which no int8 can stand for, meet bfloat16 activations where the CPU has the instruction.
ACTIVATIONS = ("int8", "float32")
# A switch for CUDA: steps of one token are recorded as CUDA graphs.
_CUDA_GRAPH = "cudagraph"
# MLC LLM's other switches, for kernels of libraries that are not used here.
_GPU_SWITCHES = (
    "flashinfer",
    "cublas_gemm",
    "faster_transformer",
    "cutlass",
    "ipc_allreduce_strategy",
)


def describe_target(device: str, opt: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the TVM target, instruction sets and kernel choices for `device` and `opt`.

    The same dictionary means the same code, so it is part of cache keys. others: names of devices
    that are known too. Raises OptionError or DeviceError.
    """
    cpu = parse_target(device, others)
    choices = parse_opt(opt)
    target: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": triple_of(cpu),
        "mcpu": cpu.name,
        "mattr": cpu.llvm_features,
        "opt-level": choices.level,
    }
    if cpu.arch == "riscv64":
        target["mabi"] = "lp64d"
    if cpu.arch == "wasm32":
        target["vector-width"] = 128
    return {"target": target, "isa": [cpu.arch, *cpu.isa], "activations": choices.activations}


def resolve(device: str) -> str:
    """Return the name of a device: of what is found here for `auto`, all others as they are."""
    return str(parse_device(device)) if device == "auto" else device


def describe_any_target(device: str, opt: str, host: str = "auto") -> dict[str, Any]:
    """Return what `describe_target` does, for GPUs and for other systems too.

    host: the LLVM triple of the system that the library is for. Raises OptionError or DeviceError.
    """
    device = resolve(device)
    gpu = gpu_target(device)
    if gpu is None:
        described = describe_target(device, opt, COMPILED_ONLY)
        if host != "auto":
            described["target"]["mtriple"] = _checked_triple(host, described["isa"][0], device)
        return described
    choices = parse_opt(opt, device)
    implied = gpu.pop("host")
    described = {
        "target": {**gpu, "host": _gpu_host(implied if host == "auto" else host, choices.level)},
        "isa": [],
        "activations": "float32",
    }
    return {**described, "cuda_graph": True} if choices.cuda_graph else described


def _gpu_host(triple: str | None, level: int) -> dict[str, Any]:
    """Return the target of the code that starts kernels; without a triple, this machine's CPU."""
    if triple is None:
        return {"kind": "llvm", "mtriple": host_triple(), "opt-level": level}
    host: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "opt-level": level}
    if triple.startswith("wasm"):
        host["vector-width"] = 128
    return host


# Systems that libraries are made for, by the ends of their LLVM triples.
_SYSTEMS = (
    *("-linux-gnu", "-linux-android", "-windows-msvc", "-windows-gnu"),
    *("-apple-macosx", "-apple-darwin", "-apple-ios", "-unknown-wasm"),
)
_ARCH_NAMES = {"arm64": "aarch64", "amd64": "x86_64"}


def _checked_triple(triple: str, arch: str, device: str) -> str:
    """Return the triple of a system; raise OptionError where it is none for this CPU."""
    name = triple.partition("-")[0]
    if not triple.rstrip("0123456789.").endswith(_SYSTEMS):
        raise OptionError(
            f"--host {triple!r} is no system that libraries are made for; write an LLVM triple "
            f"that ends in {', '.join(end[1:] for end in _SYSTEMS)}, as in aarch64-linux-android"
        )
    if _ARCH_NAMES.get(name, name) != arch:
        raise OptionError(
            f"--host {triple!r} does not go with the {arch} CPU of --device {device}; name both, "
            f"as in --device aarch64 --host aarch64-linux-android"
        )
    return triple


def is_gpu(target: dict[str, Any]) -> bool:
    """Return whether a target is a GPU's."""
    return str(target["kind"]) != "llvm"


def is_for_others(target: dict[str, Any]) -> bool:
    """Return whether programs of others run libraries for a GPU: browsers' and phones' do."""
    triple = str(host_of(target)["mtriple"])
    return triple.startswith("wasm") or triple.endswith(("-android", "-ios"))


def host_of(target: dict[str, Any]) -> dict[str, Any]:
    """Return the CPU part of a target."""
    host: dict[str, Any] = target["host"] if is_gpu(target) else target
    return host


def forms_of(target: dict[str, Any]) -> tuple[str, ...]:
    """Return the suffixes of files that a library for a target can be written to."""
    triple = host_of(target)["mtriple"]
    if triple.startswith("wasm"):
        return (".wasm", ".tar")
    if "apple" in triple:
        return (".dylib", ".so", ".tar")
    return (".dll", ".tar") if "windows" in triple else (".so", ".tar")


def check_form(path: Path, target: dict[str, Any]) -> None:
    """Raise OptionError where a library for a target has no form of this suffix."""
    *others, archive = forms_of(target)
    if path.suffix not in (*others, archive):
        raise OptionError(
            f"--output {path}: a library for {target['kind']} on {host_of(target)['mtriple']} is "
            f"written to a {' or '.join(others)} file, or to {archive}, the object files alone"
        )


class OptChoices(NamedTuple):
    """What `--opt` says: LLVM's level, the dtype of activations, whether to record CUDA graphs."""

    level: int
    activations: str
    cuda_graph: bool


def parse_opt(opt: str, device: str = "cpu") -> OptChoices:
    """Return what `--opt` says. Raises OptionError.

    Settings that have no effect on `device` are refused. Written as a level, `O0` to `O3`, and
    settings after semicolons: `O2;activations=float32`.
    """
    level, activations, cuda_graph = "O2", "int8", False
    is_cuda = device.partition(":")[0] == "cuda"
    without_effect = (
        *_GPU_SWITCHES,
        *(() if is_cuda else (_CUDA_GRAPH,)),
        *(() if device == "cpu" else ("activations",)),
    )
    for part in filter(None, (part.strip() for part in opt.split(";"))):
        name, _, value = part.partition("=")
        if part in _LLVM_LEVELS:
            level = part
        elif name == "activations" and value in ACTIVATIONS and device == "cpu":
            activations = value
        elif name == _CUDA_GRAPH and is_cuda and value in ("0", "1"):
            cuda_graph = value == "1"
        elif name in without_effect:
            raise OptionError(f"--opt {part}: {name} has no effect on {device}; leave it out")
        else:
            raise OptionError(
                f"--opt {part!r} is not known; use {', '.join(_LLVM_LEVELS)} and "
                + (
                    f"{_CUDA_GRAPH}=0|1, as in 'O2;{_CUDA_GRAPH}=1'"
                    if is_cuda
                    else f"activations={'|'.join(ACTIVATIONS)}, as in 'O2;activations=float32'"
                )
            )
    return OptChoices(_LLVM_LEVELS[level], activations, cuda_graph)


def triple_of(cpu: TargetCPU) -> str:
    """Return the LLVM triple of a CPU under the system of this machine; Apple's run macOS."""
    if cpu.arch == "wasm32":
        return "wasm32-unknown-unknown-wasm"
    if sys.platform == "darwin" or cpu.name.startswith("apple-"):
        return f"{'arm64' if cpu.arch == 'aarch64' else cpu.arch}-apple-macosx"
    if sys.platform == "win32":
        return f"{cpu.arch}-pc-windows-msvc"
    return f"{cpu.arch}-unknown-linux-gnu"


def host_triple() -> str:
    """Return the LLVM triple of this machine."""
    return triple_of(host_cpu().target)
