"""What cannot be loaded is refused with a reason, before any of its code runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlc_llm
from mlc_llm.device import host_cpu
from mlc_llm.errors import CorruptFile, LibraryError, LibraryMismatch, ModelNotFound
from mlc_llm.runtime.library import load_library


@pytest.fixture
def library(tiny_models, tmp_path) -> Path:
    """A private copy of a compiled library's directory."""
    source = tiny_models.library("llama_gqa")
    names = [*(path.name for path in source.glob("*.o")), "metadata.json"]
    directory = tmp_path / "library"
    directory.mkdir()
    for name in names:
        shutil.copy(source / name, directory / name)
    return directory


def edit_metadata(directory: Path, **changes: object) -> None:
    path = directory / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(ModelNotFound, match=r"lib\.so does not exist; compile it"):
        load_library(tmp_path / "lib.so")


def test_directory_of_something_else(tmp_path) -> None:
    with pytest.raises(LibraryError, match=r"not a compiled library: it has no metadata\.json"):
        load_library(tmp_path)


@pytest.mark.parametrize("content", [b"not a library", b"", b"\x7fELF" + bytes(100)])
def test_file_that_is_no_library(tmp_path, content) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    with pytest.raises(LibraryError, match=r"lib\.so cannot be loaded as a library"):
        load_library(path)


@pytest.mark.cpu
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"params": 5}'])
def test_damaged_metadata(library, text) -> None:
    (library / "metadata.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"metadata\.json .*compile it again"):
        load_library(library)


@pytest.mark.cpu
def test_metadata_of_another_release(library) -> None:
    edit_metadata(library, a_field_of_the_future=1)
    with pytest.raises(CorruptFile, match="not made by this release"):
        load_library(library)


@pytest.mark.cpu
def test_metadata_that_is_no_text(library) -> None:
    (library / "metadata.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CorruptFile, match=r"metadata\.json"):
        load_library(library)


@pytest.mark.cpu
def test_no_objects(library) -> None:
    for path in library.glob("*.o"):
        path.unlink()
    with pytest.raises(LibraryError, match="no object files; delete it"):
        load_library(library)


@pytest.mark.cpu
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_objects(library, damage) -> None:
    for path in library.glob("*.o"):
        content = path.read_bytes()
        part = {"empty": b"", "text": b"hello" * 99, "truncated": content[: len(content) // 2]}
        path.write_bytes(part[damage])
    with pytest.raises(LibraryError, match=r"cannot be loaded .*delete it and start again"):
        load_library(library)


@pytest.mark.cpu
def test_other_cpu(library) -> None:
    cpu = host_cpu()
    edit_metadata(library, isa=["riscv64", "generic"])
    with pytest.raises(LibraryMismatch, match=f"compiled for riscv64 .*this machine is {cpu.arch}"):
        load_library(library)
    edit_metadata(library, isa=[cpu.arch, *cpu.isa, "amx-int8"])
    with pytest.raises(LibraryMismatch, match="needs the CPU features amx-int8; this CPU"):
        load_library(library)
    # What needs less than this CPU has is welcome.
    edit_metadata(library, isa=[cpu.arch, cpu.isa[0]])
    assert load_library(library).metadata.model_type == "llama"


@pytest.mark.cpu
def test_shared_library_of_somebody_else(tmp_path) -> None:
    import ctypes.util

    other = next(Path("/lib").glob("*/libz.so*"), None) or ctypes.util.find_library("m")
    if other is None or not Path(other).is_file():
        pytest.skip("no shared library of another program was found")
    with pytest.raises(LibraryError, match=r"not a library made by mlc_llm|cannot be loaded"):
        load_library(Path(other))


def test_runtime_imports_no_compiler() -> None:
    code = (
        "import sys, mlc_llm.engine.session, mlc_llm.runtime.model; "
        "from mlc_llm.runtime.library import num_threads; print(num_threads()); "
        "print(sorted({'tvm', 'torch', 'gguf', 'huggingface_hub'} & set(sys.modules)))"
    )
    root = str(Path(mlc_llm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "TVM_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["1", "[]"]
