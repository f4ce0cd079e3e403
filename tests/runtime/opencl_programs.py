"""Programs for OpenCL: compiled as our libraries are, or written down in the compiler's layout."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Of DLPack: code, bits.
TYPES = {
    "handle": (3, 64),
    "int8": (0, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint32": (1, 32),
    "float32": (2, 32),
}


def library_code(
    source: str,
    kernels: Mapping[str, Sequence[str]],
    launch: Sequence[str] = ("blockIdx.x", "threadIdx.x"),
    form: str = "cl",
) -> bytes:
    """Return OpenCL code and the argument types of its kernels as TVM's compiler writes them."""

    def count(number: int) -> bytes:
        return struct.pack("<Q", number)

    def text(value: str) -> bytes:
        return count(len(value)) + value.encode()

    parts = [text(form), count(len(kernels))]
    for name, types in kernels.items():
        parts += [text(name), text(name), count(len(types))]
        parts += [struct.pack("<BBH", *TYPES[kind], 1) for kind in types]
        parts += [count(len(launch)), *map(text, launch)]
        parts += [count(len(types)), struct.pack(f"<{len(types)}i", *[0] * len(types))]
    return b"".join([*parts, text(source)])


def build_chain(directory: Path) -> None:
    """Write object files of `chain(x (n, 96), w (96, 80))`, all float32.

    It is `softmax(relu(x @ w) + 1) * 2`; what lies between is temporary and shares storages.
    """
    import tvm
    from tvm import relax

    from mlc_llm.compiler.gpu import gpu_phases
    from mlc_llm.compiler.output import CompiledModel

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 96), "float32"))
    w = relax.Var("w", relax.TensorType((96, 80), "float32"))
    with builder.function("chain", params=[x, w]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.matmul(x, w))))
            y = builder.emit(relax.op.nn.softmax(relax.op.add(y, relax.const(1.0, "float32"))))
            result = builder.emit_output(relax.op.multiply(y, relax.const(2.0, "float32")))
        builder.emit_func_output(result)
    mod = builder.get()
    target = tvm.target.Target({"kind": "opencl"}, host={"kind": "llvm"})
    with target:
        for _, passes in gpu_phases({"n": 64}):
            mod = tvm.transform.Sequential(passes)(mod)
        executable = relax.build(mod, target, relax_pipeline=None)
    metadata: Any = SimpleNamespace(target={"kind": "opencl"})
    CompiledModel(metadata, executable, ()).pack(directory / "objects.tar")
    with tarfile.open(directory / "objects.tar") as archive:
        archive.extractall(directory, filter="data")
