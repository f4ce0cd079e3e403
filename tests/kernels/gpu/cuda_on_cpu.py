"""Runs CUDA kernels on the CPU, their PTX instructions included, to show what they compute.

A kernel's source as it is generated is compiled as C++. Each thread of a block is a context of its
own; those of a warp take turns where they work together, warps at barriers. An `asm` statement
becomes a call of a function that does what NVIDIA's manual of PTX says of the instruction.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.tirx.build import codegen_build, split_host_device_mods
from wgsl import launches_of

from mlc_llm.compiler.gpu import schedule_rules
from mlc_llm.compiler.target import describe_any_target

_PRELUDE = Path(__file__).with_name("cuda_on_cpu.h")
_ASM = re.compile(r"\basm(?: volatile)?\(((?:\s*\"[^\"]*\")+)\s*(:.*?)\);", re.DOTALL)
_OPERAND = re.compile(r"\"[=+]?[rlf]\"")
_HELPER = re.compile(r"^__device__ __forceinline__ .*?^}$", re.DOTALL | re.MULTILINE)
_KERNEL = r'extern "C" __global__ void __launch_bounds__\((\d+)\) {}\(([^)]*)\) {{.*?^}}$'


def run(
    kernel: Any, architecture: str, directory: Path, **tensors: np.ndarray
) -> dict[str, np.ndarray]:
    """Run a kernel on tensors by the names of its arguments; return what they hold then.

    directory: where what is compiled may lie.
    """
    symbols = {}
    for buffer in kernel.params:
        if isinstance(buffer.elem_offset, tvm.ir.Var):
            symbols[str(buffer.elem_offset.name)] = 0
        for extent, value in zip(buffer.shape, tensors[str(buffer.name)].shape, strict=True):
            if isinstance(extent, tvm.ir.Var):
                symbols[str(extent.name)] = value
    source, host = translate(kernel, architecture)
    held = {name: np.array(tensor) for name, tensor in tensors.items()}
    for name, groups, numbers in launches_of(host, symbols):
        code, parameters, threads = as_cpp(source, name)
        library = compiled(code, directory)
        given = [
            held[parameter.removesuffix("_ptr")].ctypes.data_as(ctypes.c_void_p)
            if parameter.endswith("_ptr")
            else ctypes.c_int64(numbers.pop(0))  # as wide as any number
            for parameter in parameters
        ]
        fault = library.launch(*groups, threads, *given)
        assert not fault, f"line {fault} of {_PRELUDE.name}"
    return held


def translate(kernel: Any, architecture: str) -> tuple[str, str]:
    """Return a kernel's CUDA source, and the host's code, which starts it."""
    described = describe_any_target(f"cuda:{architecture}", "O2")["target"]
    target = tvm.target.Target(described)
    mod = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    with target:
        mod = schedule_rules()(mod)
    pipeline, _, finish = tvm.tirx.get_default_tir_pipeline(target)
    host, devices = split_host_device_mods(pipeline(tvm.tirx.transform.BindTarget(target)(mod)))
    ((device_target, device),) = devices.items()
    source = codegen_build(finish()(device), device_target).inspect_source()
    return source, host["kernel"].script()


def as_cpp(source: str, name: str) -> tuple[str, list[str], int]:
    """Return C++ of one kernel with a function `launch`, names of the kernel's parameters, threads.

    launch(blocks in x, in y, threads, the kernel's arguments ...)
    """
    found = re.search(_KERNEL.format(name), source, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    declared = found[2].split(", ")
    parameters = [parameter.split()[-1] for parameter in declared]
    body = found[0].replace("__shared__ alignas(64)", "alignas(64) __shared__")
    helpers = [_ASM.sub(_as_call, helper) for helper in _HELPER.findall(source)]
    call = f"{name}({', '.join(parameters)});"
    launch = (
        f'extern "C" int launch(int blocks_x, int blocks_y, int threads, {found[2]}) {{\n'
        f"  return run_blocks(blocks_x, blocks_y, threads, [=] {{ {call} }});\n}}"
    )
    return "\n".join([_PRELUDE.read_text(), *helpers, body, launch]), parameters, int(found[1])


def _as_call(statement: re.Match[str]) -> str:
    """Return a call of the function of an instruction, operands in the instruction's order."""
    template = "".join(re.findall(r'"([^"]*)"', statement[1]))
    instruction, _, operands = template.rstrip(";").partition(" ")
    expressions = []
    for operand in _OPERAND.finditer(statement[2]):
        depth, start = 0, operand.end()
        for end in range(start, len(statement[2])):
            depth += {"(": 1, ")": -1}.get(statement[2][end], 0)
            if depth == 0:
                break
        expressions.append(statement[2][start : end + 1])
    # What is no operand is a number, as the bytes of a copy.
    given = [
        expressions[int(word[1:])] if word.startswith("%") else word
        for word in re.findall(r"%?\d+", operands)
    ]
    return f"{re.sub(r'[.:]+', '_', instruction)}({', '.join(given)});"


def compiled(code: str, directory: Path) -> ctypes.CDLL:
    """Return the library of C++ code, which may be there from an earlier call."""
    path = directory / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.cpp"
    library = path.with_suffix(".so")
    if not library.exists():
        path.write_text(code)
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing"]
        subprocess.run([*command, "-o", str(library), str(path)], check=True)
    return ctypes.CDLL(str(library))
