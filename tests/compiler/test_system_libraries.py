"""Object files of several models, linked into one program, keep apart by their prefixes."""

from __future__ import annotations

import ctypes
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mlc_llm.artifact import LibraryMetadata, read_chat_config
from mlc_llm.compiler.linkers import find_linker
from mlc_llm.compiler.system_library import find_system_prefix, prefix_of
from mlc_llm.compiler.target import host_triple
from mlc_llm.errors import OptionError
from mlc_llm.runtime.library import load_library

pytestmark = pytest.mark.cpu


def objects_of(tiny_models: Any, model: str, prefix: str, place: Path) -> list[str]:
    """Compile a model to object files for this machine; return their paths."""
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    config = read_chat_config(tiny_models.artifact(model, "q4f16_1"))
    options = CompileOptions(device="cpu", system_prefix=prefix)
    compile_model(config, options, lambda _: None).pack(place / f"{prefix}.tar")
    with tarfile.open(place / f"{prefix}.tar") as archive:
        archive.extractall(place, filter="data")
        return [str(place / name) for name in archive.getnames()]


def metadata_of(prefix: str) -> LibraryMetadata:
    """Ask the model of a prefix, among those of this process, what it is."""
    import tvm_ffi

    machine = tvm_ffi.system_lib(prefix)["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 1)
    return LibraryMetadata.from_json(str(machine["_metadata"]()), prefix)


def test_two_models_in_one_program(tiny_models: Any, tmp_path: Path) -> None:
    models = {"first_": "llama_gqa", "second_": "qwen2_gqa"}
    objects = [
        path
        for prefix, model in models.items()
        for path in objects_of(tiny_models, model, prefix, tmp_path)
    ]
    assert len({Path(path).name for path in objects}) == 4
    program = tmp_path / "program.so"
    linker = find_linker(host_triple(), program)
    # Functions of one name in two models would be an error here.
    subprocess.run([linker, "-shared", "-o", program, *objects], check=True)
    load_library(tiny_models.library("llama_gqa", "q4f16_1"))  # brings the runtime
    ctypes.CDLL(str(program), ctypes.RTLD_GLOBAL)
    assert {prefix: metadata_of(prefix).model_type for prefix in models} == {
        "first_": "llama",
        "second_": "qwen2",
    }


@pytest.mark.parametrize(
    ("device", "object_format", "kernels"),
    [
        ("android", b"\x7fELF", b"__kernel"),
        ("iphone", b"\xcf\xfa\xed\xfe", b"threadgroup_position_in_grid"),
    ],
)
def test_code_for_phones(
    tiny_models: Any, tmp_path: Path, device: str, object_format: bytes, kernels: bytes
) -> None:
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    config = read_chat_config(tiny_models.artifact("llama_gqa", "q4f16_1"))
    options = CompileOptions(device=device, system_prefix="mine_")
    compile_model(config, options, lambda _: None).pack(tmp_path / "lib.tar")
    with tarfile.open(tmp_path / "lib.tar") as archive:
        objects = {name: archive.extractfile(name).read() for name in archive.getnames()}
    assert objects.keys() == {"mine_lib0.o", "mine_devc.o"}
    assert all(code.startswith(object_format) for code in objects.values())
    assert kernels in objects["mine_devc.o"]
    assert b"__tvm_ffi_mine_" in objects["mine_lib0.o"]


@pytest.mark.parametrize(
    ("asked", "device", "output", "prefix"),
    [
        ("auto", "android", "lib.tar", "phi-msft_q4f16_1_"),
        ("auto", "iphone", "lib.tar", "phi-msft_q4f16_1_"),
        ("auto", "iphone", "lib.dylib", None),
        ("auto", "cpu", "lib.tar", None),
        ("auto", "webgpu", "lib.wasm", None),
        ("mine_", "cpu", "lib.tar", "mine_"),
    ],
)
def test_the_usual_prefix(asked: str, device: str, output: str, prefix: str | None) -> None:
    found = find_system_prefix(asked, device, Path(output), "phi-msft", "q4f16_1")
    assert found == (prefix and prefix.replace("-", "_"))
    assert prefix_of("a b", "q") == "a_b_q_"


@pytest.mark.parametrize("asked", ["", "1st", "a-b", "a b", "ä"])
def test_a_prefix_that_is_no_name(asked: str) -> None:
    with pytest.raises(OptionError, match="letters, digits and underscores"):
        find_system_prefix(asked, "android", Path("lib.tar"), "llama", "q4f16_1")


@pytest.mark.parametrize("output", ["lib.so", "model.wasm"])
def test_a_library_of_its_own_has_no_prefix(output: str) -> None:
    with pytest.raises(OptionError, match=rf"functions of {output} are found without a prefix"):
        find_system_prefix("mine_", "cpu", Path(output), "llama", "q4f16_1")
