"""NVIDIA's machine code from CUDA source, made by NVRTC from PyPI or by the toolkit's nvcc.

TVM asks for it where there is a driver; elsewhere it leaves source in a library, to be compiled
where that is loaded. Here the library gets machine code in any case. Knows no model.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm_ffi

from mlc_llm.errors import CompileError

_PACKAGE = "nvidia-cuda-nvrtc"
_WITH_HEADERS = "13.3"  # the first release that brings the headers that kernels include
# Headers that TVM includes beside int8, and that NVRTC has built in instead.
_BUILT_IN = (b"sm_61_intrinsics.h",)
_LIBRARY = re.compile(r"(lib)?nvrtc(64_\d+_0)?\.(so\.\d+|dll)")
_TOOLKIT = "/usr/local/cuda/bin/nvcc"
_CALLBACK = "tvm_callback_cuda_compile"
# Arithmetic as in TVM's own builds: short forms of powers, divisions and roots.
_OPTIONS = ("--use_fast_math", "--ptxas-options=-v")
_OF_KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
_INSTALL = (
    f"`pip install {_PACKAGE}` (58 MB; Linux and Windows), or install the CUDA toolkit, whose nvcc "
    "is looked for on the PATH"
)
_LAST_LINES = 6


@dataclass(frozen=True)
class MachineCode:
    """An ELF file of kernels for one architecture, and what the assembler tells of each kernel."""

    cubin: bytes
    report: str

    def resources(self) -> dict[str, Resources]:
        """Return what each kernel takes, by its name."""
        return {
            name: Resources(int(registers), int(stores) + int(loads), int(shared or 0))
            for name, stores, loads, registers, shared in _OF_KERNEL.findall(self.report)
        }


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes moved for want of them, shared memory that
    is not asked for when it is started.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int


def require_compiler(target: dict[str, Any]) -> None:
    """Raise CompileError unless code for this target can be made here; others than CUDA can."""
    if target["kind"] == "cuda":
        _find_compiler()


@contextlib.contextmanager
def making_machine_code(target: dict[str, Any]) -> Iterator[None]:
    """While this is open, let TVM, where it makes machine code by itself, make it as we do."""
    if target["kind"] != "cuda":
        yield
        return
    earlier = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)

    def compile_source(source: str) -> bytes:
        return assemble(source, target["arch"]).cubin

    tvm_ffi.register_global_func(_CALLBACK, compile_source, override=True)
    try:
        yield
    finally:
        if earlier is None:
            tvm_ffi.registry.remove_global_func(_CALLBACK)
        else:
            tvm_ffi.register_global_func(_CALLBACK, earlier, override=True)


def assemble(source: str, architecture: str) -> MachineCode:
    """Compile CUDA source for an architecture such as sm_90. Raises CompileError."""
    compiler = _find_compiler()
    compile_source = _by_nvcc if compiler.stem == "nvcc" else _by_nvrtc
    made = compile_source(compiler, source, architecture)
    spilling = [name for name, taken in made.resources().items() if taken.spilled_bytes]
    if not spilling:
        return made
    # Registers were spared for more blocks at a time; said that one will do, they are not.
    bounds = rf"(__launch_bounds__\(\d+)\) ({'|'.join(spilling)})\("
    return compile_source(compiler, re.sub(bounds, r"\1, 1) \2(", source), architecture)


def _find_compiler() -> Path:
    """Return the file of NVRTC or of nvcc."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(_PACKAGE) or []:
            if _LIBRARY.fullmatch(file.name):
                return Path(str(file.locate()))
    found = shutil.which("nvcc") or shutil.which(_TOOLKIT)
    if found is None:
        raise CompileError(
            f"code for NVIDIA GPUs needs NVIDIA's compiler, and none is here: {_INSTALL}"
        )
    return Path(found)


def _by_nvcc(nvcc: Path, source: str, architecture: str) -> MachineCode:
    with tempfile.TemporaryDirectory(prefix="mlc-llm-cuda-") as directory:
        code, cubin = Path(directory, "kernels.cu"), Path(directory, "kernels.cubin")
        code.write_text(source)
        command = [str(nvcc), "--cubin", "-arch", architecture, "-O3", *_OPTIONS]
        done = subprocess.run(
            [*command, "-o", str(cubin), str(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise CompileError(
                f"{nvcc} failed for {architecture}: {_end(done.stdout)}; if it lacks a C++ "
                f"compiler or does not know the architecture, `pip install {_PACKAGE}`"
            )
        return MachineCode(cubin.read_bytes(), done.stdout)


def _by_nvrtc(library: Path, source: str, architecture: str) -> MachineCode:
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    if not hasattr(nvrtc, "nvrtcInstallBundledHeaders"):
        raise CompileError(
            f"{library} is too old, it has no headers; `pip install '{_PACKAGE}>={_WITH_HEADERS}'`"
        )

    def check(code: int, what: str) -> None:
        if code:
            reason = nvrtc.nvrtcGetErrorString(code).decode()
            raise CompileError(f"NVRTC ({library}) cannot {what}: {reason}")

    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(_BUILT_IN))(*_BUILT_IN)
    contents = (ctypes.c_char_p * len(_BUILT_IN))(*(b"" for _ in _BUILT_IN))
    with tempfile.TemporaryDirectory(prefix="mlc-llm-cuda-") as headers:
        check(
            nvrtc.nvrtcInstallBundledHeaders(headers.encode(), 0, None),
            f"unpack its headers to {headers}",
        )
        check(
            nvrtc.nvrtcCreateProgram(
                *(ctypes.byref(program), source.encode(), b"kernels.cu"),
                *(len(_BUILT_IN), contents, names),
            ),
            "read the source",
        )
        try:
            options = [
                *(f"--gpu-architecture={architecture}", "-default-device", "--device-int128"),
                *(f"-I{headers}", f"-I{headers}/cccl", *_OPTIONS),
            ]
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = nvrtc.nvrtcCompileProgram(program, len(options), words)
            report = _text_of(nvrtc, program, "ProgramLog").decode(errors="replace")
            if failed:
                raise CompileError(
                    f"NVRTC ({library}) failed for {architecture}: {_end(report)}; a GPU that it "
                    "is too new for needs the nvcc of an older CUDA toolkit"
                )
            return MachineCode(_text_of(nvrtc, program, "CUBIN"), report.rstrip("\0"))
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text_of(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.raw


def _end(output: str) -> str:
    lines = [line.strip() for line in output.strip("\0\n ").splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line]
    return " / ".join((wrong or lines)[-_LAST_LINES:]) or "it said nothing"


def pack_machine_code(
    architecture: str, module: Any, is_system_library: bool, prefix: str, directory: str
) -> str:
    """Write what a library imports as an object file, CUDA source as machine code; return its path.

    module: of a compiled model. Arguments but the first are those that TVM's `export_library` calls
    its `fpack_imports` with.
    """
    host = module.imports[0]
    pack = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
    packed: bytes = pack(module).numpy().tobytes()
    for device in host.imports:
        source = device.inspect_source()
        if device.kind == "cuda" and is_source(packed, source):
            packed = with_machine_code(packed, source, assemble(source, architecture).cubin)
    object_file = Path(directory, f"{prefix}devc.o")
    emit = tvm_ffi.get_global_func("codegen.codegen_blob")
    triple = host.get_function("_get_target_string")()
    emit(packed, is_system_library, triple, prefix).write_to_file(str(object_file))
    return str(object_file)


def is_source(packed: bytes, source: str) -> bool:
    """Return whether packed modules have this CUDA source, not machine code of it."""
    return _counted(source.encode()) in packed


def with_machine_code(packed: bytes, source: str, cubin: bytes) -> bytes:
    """Replace the CUDA source in packed modules.

    packed: the number of bytes that follow, then modules, each a kind, a number of bytes and those:

        "cuda" | size | format "cuda" | table of kernels | source    (texts are after their size)
    """
    text, kind = _counted(source.encode()), _counted(b"cuda")
    source_at = packed.index(text)
    format_at = packed.rindex(kind, 0, source_at)
    size_at, end = format_at - 8, source_at + len(text)
    is_module = packed[:size_at].endswith(kind)
    if not is_module or struct.unpack_from("<Q", packed, size_at) != (end - format_at,):
        raise CompileError(
            "TVM packs CUDA modules in a form that is not known; install the version of "
            "apache-tvm that mlc_llm asks for"
        )
    table = packed[format_at + len(kind) : source_at]
    content = _counted(b"cubin") + table + _counted(cubin)
    rest = packed[8:size_at] + _counted(content) + packed[end:]
    return _counted(rest)


def _counted(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content
