"""Machine code for NVIDIA's GPUs: made in place of source, or asked for by name."""

from __future__ import annotations

import importlib.metadata
import shutil
import struct
from pathlib import Path

import pytest
import tvm_ffi

from mlc_llm.artifact import read_chat_config
from mlc_llm.compiler import cuda_code
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.compiler.cuda_code import (
    MachineCode,
    Resources,
    assemble,
    making_machine_code,
    with_machine_code,
)
from mlc_llm.errors import CompileError

pytestmark = pytest.mark.cpu

KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }'
TARGET = {"kind": "cuda", "arch": "sm_90"}
ELF = b"\x7fELF"


def counted(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def packed(form: bytes, code: bytes) -> bytes:
    """Return modules as TVM packs them: a CUDA one between others."""
    module = counted(form) + counted(b"a table") + counted(code)
    others = counted(b"cuda") + counted(b"no module")
    return counted(others + counted(b"cuda") + counted(module) + others)


@pytest.fixture
def nothing_installed(monkeypatch) -> None:
    def files(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_without_a_compiler_nothing_is_begun(tiny_models, nothing_installed) -> None:
    config, begun = read_chat_config(tiny_models.artifact("llama_gqa", "q4f16_1")), []
    with pytest.raises(CompileError, match=r"pip install nvidia-cuda-nvrtc.*nvcc.*PATH"):
        compile_model(config, CompileOptions(device="cuda:sm_90"), begun.append)
    assert not begun


def test_source_is_replaced_in_its_place() -> None:
    found = with_machine_code(packed(b"cuda", b"source"), "source", b"machine code")
    assert found == packed(b"cubin", b"machine code")


@pytest.mark.parametrize("form", [b"ptx", b"source"])
def test_another_form_of_modules_is_refused(form) -> None:
    with pytest.raises(CompileError, match=r"form that is not known.*apache-tvm"):
        with_machine_code(packed(form, b"source"), "source", b"machine code")


def test_code_for_an_architecture() -> None:
    made = assemble(KERNEL, "sm_80")
    assert made.cubin.startswith(ELF)
    assert 0 < made.resources()["twice"].registers < 32


@pytest.mark.parametrize(
    ("source", "architecture", "message"),
    [(KERNEL.replace("x[", "y["), "sm_90", 'sm_90.*"y" is undefined'), (KERNEL, "sm_12", "sm_12")],
)
def test_what_the_compiler_says_is_passed_on(source, architecture, message) -> None:
    with pytest.raises(CompileError, match=message):
        assemble(source, architecture)


def test_tvm_is_handed_machine_code_while_it_builds() -> None:
    name = "tvm_callback_cuda_compile"
    earlier = tvm_ffi.get_global_func(name)
    with making_machine_code(TARGET):
        assert bytes(tvm_ffi.get_global_func(name)(KERNEL)).startswith(ELF)
    assert tvm_ffi.get_global_func(name).same_as(earlier)


def test_an_old_compiler_is_named(monkeypatch, tmp_path) -> None:
    old = tmp_path / "libnvrtc.so.12"
    monkeypatch.setattr(cuda_code, "_find_compiler", lambda: old)
    monkeypatch.setattr(cuda_code.ctypes, "CDLL", lambda path: OldNvrtc())
    with pytest.raises(
        CompileError, match=r"libnvrtc\.so\.12 is too old.*pip install 'nvidia-cuda-nvrtc>=13.3'"
    ):
        assemble(KERNEL, "sm_90")


class OldNvrtc:
    """A library without what NVRTC 13 has."""

    class nvrtcGetErrorString:
        restype = None


def test_kernels_that_spill_are_given_registers(monkeypatch) -> None:
    def compile_source(compiler: Path, source: str, architecture: str) -> MachineCode:
        spilled = 0 if "(128, 1) slow(" in source else 16
        return MachineCode(source.encode(), report(fast=0, slow=spilled))

    def report(**spilled: int) -> str:
        return "".join(
            f"ptxas info : Compiling entry function '{name}' for 'sm_90'\n"
            f"    0 bytes stack frame, {count} bytes spill stores, {count} bytes spill loads\n"
            "ptxas info : Used 80 registers, used 1 barriers, 1024 bytes smem\n"
            for name, count in spilled.items()
        )

    monkeypatch.setattr(cuda_code, "_find_compiler", lambda: Path("nvcc"))
    monkeypatch.setattr(cuda_code, "_by_nvcc", compile_source)
    kernels = "__launch_bounds__(64) fast(); __launch_bounds__(128) slow();"
    made = assemble(kernels, "sm_90")
    assert made.cubin.decode() == kernels.replace("(128)", "(128, 1)")
    assert made.resources()["slow"] == Resources(80, 0, 1024)
