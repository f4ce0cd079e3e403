"""Libraries for CPUs other than this one: their targets, their linkers, and who refuses them."""

import dataclasses
import shutil
import struct
import sys

import pytest

from mlc_llm import device
from mlc_llm.artifact import read_chat_config
from mlc_llm.compiler.target import describe_target
from mlc_llm.device import host_cpu, missing_features, parse_cpu
from mlc_llm.engine.session import ChatSession
from mlc_llm.errors import (
    DeviceError,
    LibraryError,
    LibraryMismatch,
    LinkerNotFound,
    OptionError,
)
from mlc_llm.runtime import library
from mlc_llm.runtime.library import load_library

IS_LINUX_X86 = sys.platform == "linux" and host_cpu().arch == "x86_64"
linux_x86 = pytest.mark.skipif(not IS_LINUX_X86, reason="names CPUs as seen from Linux on x86-64")
ELF_AARCH64 = 183


@pytest.mark.skipif(sys.platform != "linux", reason="triples carry the system of the host")
@pytest.mark.parametrize(
    ("name", "triple", "cpu", "features", "isa"),
    [
        ("haswell", "x86_64-unknown-linux-gnu", "x86-64-v3", [], ["x86_64", "x86-64-v3"]),
        (
            "x86-64-v4+avx512vnni",
            "x86_64-unknown-linux-gnu",
            "x86-64-v4",
            ["+avx512vnni", "-prefer-256-bit"],
            ["x86_64", "x86-64-v4", "avx512vnni"],
        ),
        (
            "aarch64+dotprod",
            "aarch64-unknown-linux-gnu",
            "generic",
            ["+dotprod"],
            ["aarch64", "neon", "dotprod"],
        ),
        (
            "apple-m1",
            "arm64-apple-macosx",
            "apple-m1",
            ["+dotprod", "+fullfp16"],
            ["aarch64", "neon", "dotprod", "fullfp16"],
        ),
        (
            "wasm32",
            "wasm32-unknown-unknown-wasm",
            "generic",
            ["+simd128"],
            ["wasm32", "wasm", "simd128"],
        ),
    ],
)
def test_targets(name, triple, cpu, features, isa):
    assert describe_target(name, "O1;activations=float32") == {
        "target": {
            "kind": "llvm",
            "mtriple": triple,
            "mcpu": cpu,
            "mattr": features,
            "opt-level": 1,
            **({"vector-width": 128} if name == "wasm32" else {}),
        },
        "isa": isa,
        "activations": "float32",
    }


def compile_for(tiny_models, name):
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    config = read_chat_config(tiny_models.artifact("llama_gqa", "q4f16_1"))
    return compile_model(config, CompileOptions(device=name), lambda _: None)


@pytest.fixture
def on(monkeypatch):
    """Return a function that makes this machine have the CPU of a name."""

    def set_host(name):
        cpu = dataclasses.replace(
            host_cpu(), **dataclasses.asdict(parse_cpu(name)), model=f"Some {name}"
        )
        monkeypatch.setattr(device, "host_cpu", lambda: cpu)
        monkeypatch.setattr(library, "host_cpu", lambda: cpu)

    return set_host


@pytest.mark.cpu
@linux_x86
def test_a_cpu_without_the_instructions_is_refused(tiny_models, tmp_path, on):
    """A real library for what this machine has, loaded as if it had less."""
    if missing_features(["x86-64-v3"]):
        pytest.skip("this CPU has no more than the lowest instruction sets")
    compiled = compile_for(tiny_models, "x86-64-v3")
    shared, objects = tmp_path / "lib.so", tmp_path / "objects"
    compiled.link(shared)
    compiled.save_objects(objects)
    for path in (shared, objects):
        assert load_library(path).metadata.isa == ["x86_64", "x86-64-v3"]
    on("znver4")
    for path in (shared, objects):
        assert load_library(path).metadata.isa == ["x86_64", "x86-64-v3"]
    on("nehalem")
    for path in (shared, objects):
        with pytest.raises(LibraryMismatch) as caught:
            load_library(path)
        message = str(caught.value)
        assert str(path) in message and "needs the CPU features x86-64-v3" in message
        assert "Some nehalem" in message and "x86-64-v2" in message
    on("neoverse-n1")
    for path in (shared, objects):
        with pytest.raises(LibraryMismatch, match="for x86_64 CPUs, this machine is aarch64"):
            load_library(path)


@pytest.mark.cpu
@linux_x86
@pytest.mark.parametrize("name", ["x86-64", "x86-64-v2", "aarch64", "neoverse-n1", "apple-m1"])
def test_models_compile_for_other_cpus(tiny_models, tmp_path, name):
    compiled = compile_for(tiny_models, name)
    cpu = parse_cpu(name)
    assert compiled.metadata.isa == [cpu.arch, *cpu.isa]
    compiled.save_objects(tmp_path)
    head = next(tmp_path.glob("*.o")).read_bytes()[:20]
    if name == "apple-m1":
        assert head[:4] == struct.pack("<I", 0xFEEDFACF)  # Mach-O, 64 bits
        with pytest.raises(LinkerNotFound, match=r"arm64-apple-macosx.*on such a machine"):
            compiled.link(tmp_path / "lib.so")
        return
    assert head[:4] == b"\x7fELF"
    if cpu.arch == "x86_64":
        assert load_library(tmp_path).metadata == compiled.metadata
        return
    assert struct.unpack_from("<H", head, 18)[0] == ELF_AARCH64
    with pytest.raises(LibraryMismatch, match="for aarch64 CPUs, this machine is x86_64"):
        load_library(tmp_path)


@pytest.mark.cpu
@linux_x86
def test_linking_for_another_architecture(tiny_models, tmp_path, monkeypatch):
    compiled = compile_for(tiny_models, "aarch64+dotprod")
    path = tmp_path / "lib.so"
    if shutil.which("aarch64-linux-gnu-gcc") or shutil.which("aarch64-linux-gnu-g++"):
        compiled.link(path)
        assert struct.unpack_from("<H", path.read_bytes(), 18)[0] == ELF_AARCH64
        with pytest.raises(LibraryError, match=r"lib\.so"):
            load_library(path)
        path.unlink()
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/c++" if name == "c++" else None)
    with pytest.raises(LinkerNotFound, match=r"aarch64-linux-gnu-g\+\+.*apt install g\+\+-aarch64"):
        compiled.link(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.cpu
def test_unknown_cpu_is_refused_before_any_work(tiny_models):
    stages = []
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    config = read_chat_config(tiny_models.artifact("llama_gqa", "q4f16_1"))
    with pytest.raises(OptionError, match=r"'znver9' is not known.*znver4"):
        compile_model(config, CompileOptions(device="znver9"), stages.append)
    assert not stages


@linux_x86
def test_a_session_on_another_cpu_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="'neoverse-n1' is an aarch64 CPU"):
        ChatSession.open(tmp_path, tmp_path, device="neoverse-n1")
