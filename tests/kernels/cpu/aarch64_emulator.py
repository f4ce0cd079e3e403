"""Compiles kernels for AArch64 and runs them in QEMU's user mode, by way of `run_kernel.c`."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.compiler.target import describe_target

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
# Real CPUs that have no more than what the code is made for.
MODELS = {"aarch64": "cortex-a53", "aarch64+dotprod": "cortex-a76"}
TIMEOUT_S = 60

# Bytes after an output that a kernel must leave alone.
_GUARD = 64
_DLPACK_CODES = {"i": 0, "u": 1, "f": 2}


def missing_program() -> str | None:
    """Return why nothing can be run here, None where it can."""
    for name, package in ((COMPILER, "gcc-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(name) is None:
            return f"{name} is not installed (Debian: apt install {package})"
    return None


class Emulator:
    """Builds kernels for a device, in a directory of its own."""

    def __init__(self, device: str, directory: Path) -> None:
        self.device, self.directory = device, directory
        self._driver = directory / "run_kernel.o"
        self._count = 0

    def build(self, func: Any) -> Callable[..., NDArray[Any]]:
        """Compile a PrimFunc whose last argument is its output; see `conftest.build_kernel`."""
        import tvm

        self._count += 1
        name = f"kernel{self._count}"
        target = tvm.target.Target(describe_target(self.device, "O2")["target"])
        module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        objects: list[str] = []

        def keep(_: str, files: list[str], **__: Any) -> None:
            for index, file in enumerate(files):
                objects.append(str(self.directory / f"{name}-{index}.o"))
                shutil.copy(file, objects[-1])

        tvm.compile(module, target=target).export_library(
            str(self.directory / f"{name}.o"), fcompile=keep
        )
        program = self.directory / name
        compile_c = [COMPILER, "-static", "-o", str(program), self._driver_object(), *objects]
        subprocess.run(compile_c, check=True, timeout=TIMEOUT_S)
        command = [EMULATOR, "-cpu", MODELS[self.device], str(program)]

        def call(
            *inputs: NDArray[Any], shape: tuple[int, ...], dtype: Any = np.float32
        ) -> NDArray[Any]:
            # What is not written stays at a value that no test expects.
            size = int(np.prod(shape))
            out = np.full(size + _GUARD, 113, dtype)
            arrays = [*map(_describe, inputs), _describe(out[:size].reshape(shape), out.tobytes())]
            stdin = struct.pack("<i", len(arrays)) + b"".join(arrays)
            run = subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT_S)
            assert run.returncode == 0, run.stderr.decode(errors="replace")
            out = np.frombuffer(run.stdout, dtype)
            assert (out[size:] == 113).all(), "the kernel wrote behind its output"
            return out[:size].reshape(shape)

        return call

    def _driver_object(self) -> str:
        if not self._driver.exists():
            import tvm_ffi.libinfo

            includes = [
                tvm_ffi.libinfo.find_include_path(),
                tvm_ffi.libinfo.find_dlpack_include_path(),
            ]
            source = Path(__file__).with_name("run_kernel.c")
            subprocess.run(
                [
                    *(COMPILER, "-O1", "-Wall", "-Werror", "-c", str(source)),
                    *(f"-I{path}" for path in includes),
                    *("-o", str(self._driver)),
                ],
                check=True,
                timeout=TIMEOUT_S,
            )
        return str(self._driver)


def _describe(array: NDArray[Any], data: bytes | None = None) -> bytes:
    """Return an array as `run_kernel.c` reads it."""
    data = np.ascontiguousarray(array).tobytes() if data is None else data
    code, bits = _DLPACK_CODES[array.dtype.kind], array.dtype.itemsize * 8
    head = struct.pack("<iii", code, bits, array.ndim)
    return head + struct.pack(f"<{array.ndim}q", *array.shape) + struct.pack("<q", len(data)) + data
