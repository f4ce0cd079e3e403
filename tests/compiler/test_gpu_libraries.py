"""Libraries for GPUs: code is made for each, and what cannot be done is refused before the work."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mlc_llm import gpus, opencl
from mlc_llm.artifact import KVCacheLayout, TensorSpec, read_chat_config
from mlc_llm.compiler import linkers
from mlc_llm.compiler.browser import emscripten
from mlc_llm.compiler.browser.limits import check_buffers
from mlc_llm.compiler.gpu_targets import CUDA_ARCHITECTURES, gpu_target
from mlc_llm.compiler.target import check_form, describe_any_target, forms_of
from mlc_llm.errors import (
    DeviceError,
    LibraryMismatch,
    LinkerNotFound,
    OptionError,
    UnsupportedModel,
)
from mlc_llm.runtime.library import load_library

pytestmark = pytest.mark.cpu

# What the npm package @mlc-ai/web-llm 0.2.86 looks for.
WEB_LLM_FUNCTIONS = (
    *("embed", "prefill", "decode", "batch_prefill", "batch_decode", "_metadata"),
    *("create_tir_paged_kv_cache", "softmax_with_temperature", "argsort_probs"),
    *("sample_with_top_p", "apply_bitmask_inplace", "apply_penalty_inplace"),
    "apply_logit_bias_inplace",
)
# What the engine calls.
ENGINE_FUNCTIONS = ("forward", "forward_single", "copy_pages", "sample_on_host", "_metadata")
# Device -> what its code has in it, its entries, and what is said where it is not at hand.
CODE = {
    "webgpu": (b"@compute @workgroup_size", WEB_LLM_FUNCTIONS, "run in a browser, with web-llm"),
    "android": (b"__kernel", WEB_LLM_FUNCTIONS, "opencl and aarch64-linux-android, and is run"),
    "cuda:sm_90": (b".nv.info.", ENGINE_FUNCTIONS, "compiled for cuda: .*driver"),  # machine code
    "metal": (b"threadgroup_position_in_grid", ENGINE_FUNCTIONS, "compiled for metal and arm64-"),
    "opencl": (b"__kernel", ENGINE_FUNCTIONS, "compiled for opencl: OpenCL .*not installed"),
}


def compile_for(artifact: Path, device: str, **options: Any) -> Any:
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    return compile_model(
        read_chat_config(artifact), CompileOptions(device=device, **options), lambda _: None
    )


@pytest.mark.parametrize("device", CODE)
def test_code_is_made(tiny_models, tmp_path, monkeypatch, device) -> None:
    code, functions, refusal = CODE[device]
    compiled = compile_for(tiny_models.artifact("llama_gqa", "q4f16_1"), device)
    metadata = json.loads(compiled.metadata.to_json())
    kind = {"android": "opencl"}.get(device, device.partition(":")[0])
    assert metadata["target"]["kind"] == kind
    assert [p["name"] for p in metadata["params"]]
    assert metadata["prefill_chunk_size"] > 0
    assert set(compiled.step_entries) & compiled.metadata.memory_usage.keys()
    assert "KV cache" in compiled.memory_plan()
    path = tmp_path / "library.tar"
    compiled.save(path, tmp_path / "cache", lambda _: None)
    with tarfile.open(path) as archive:
        objects = {name: archive.extractfile(name).read() for name in archive.getnames()}
    library = b"".join(objects.values())
    assert code in library
    for name in functions:
        assert name.encode() in library, name
    # Where the device is not at hand, that is what is said.
    compiled.save_objects(tmp_path / "objects")
    monkeypatch.setattr(gpus, "_CUDA_DRIVER", "no-such-driver.so")
    monkeypatch.setattr(opencl, "OPENCL_LIBRARY", "no-such-library.so")
    gpus.gpus_of.cache_clear()
    gpus._ask_cuda.cache_clear()
    with pytest.raises((LibraryMismatch, DeviceError), match=refusal):
        load_library(tmp_path / "objects")
    gpus.gpus_of.cache_clear()
    gpus._ask_cuda.cache_clear()


def test_hosts_of_gpus() -> None:
    targets = {
        name: describe_any_target(name, "O1")["target"] for name in ("webgpu", "metal", "android")
    }
    assert targets["webgpu"]["host"]["mtriple"] == "wasm32-unknown-unknown-wasm"
    assert targets["metal"]["host"]["mtriple"] == "arm64-apple-macosx"
    assert targets["android"]["host"]["mtriple"] == "aarch64-linux-android"
    assert targets["android"]["kind"] == "opencl"
    other = describe_any_target("opencl", "O2", "aarch64-linux-android")["target"]
    assert other["host"]["mtriple"] == "aarch64-linux-android"
    assert all(target["host"]["opt-level"] == 1 for target in targets.values())


@pytest.mark.parametrize(
    ("device", "host", "forms"),
    [
        ("webgpu", "auto", (".wasm", ".tar")),
        ("metal", "auto", (".dylib", ".so", ".tar")),
        ("aarch64", "aarch64-linux-android", (".so", ".tar")),
        ("x86-64-v3", "x86_64-pc-windows-msvc", (".dll", ".tar")),
        ("apple-m1", "arm64-apple-ios", (".dylib", ".so", ".tar")),
    ],
)
def test_forms_of_output(device, host, forms) -> None:
    target = describe_any_target(device, "O2", host)["target"]
    assert forms_of(target) == forms
    for suffix in forms:
        check_form(Path(f"library{suffix}"), target)
    with pytest.raises(OptionError, match=re.escape(" or ".join(forms[:-1]))):
        check_form(Path("library.exe"), target)


def test_objects_for_other_systems(tiny_models, tmp_path) -> None:
    artifact, path = tiny_models.artifact("llama_gqa", "q4f16_1"), tmp_path / "windows.tar"
    compiled = compile_for(artifact, "x86-64-v3", host="x86_64-pc-windows-msvc")
    compiled.save(path, tmp_path, lambda _: None)
    with tarfile.open(path) as archive:
        code = archive.extractfile("lib0.o").read()
    assert code.startswith(b"\x64\x86")  # COFF of x86-64


def test_risc_v_has_registers_for_floats(tiny_models, tmp_path) -> None:
    compiled = compile_for(tiny_models.artifact("llama_gqa", "q4f16_1"), "riscv64")
    compiled.save_objects(tmp_path)
    code = (tmp_path / "lib0.o").read_bytes()
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == 243  # RISC-V
    assert code[48] & 0b110 == 0b100  # the ABI passes doubles in registers


@pytest.mark.parametrize("is_installed", [True, False])
def test_zig_links_where_no_cross_compiler_is(monkeypatch, is_installed) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    spec = importlib.machinery.ModuleSpec("ziglang", None) if is_installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(linkers, "host_triple", lambda: "x86_64-unknown-linux-gnu")
    triple, path = "riscv64-unknown-linux-gnu", Path("library.so")
    if not is_installed:
        with pytest.raises(LinkerNotFound, match=r"g\+\+-riscv64-linux-gnu; or pip install zig"):
            linkers.find_linker(triple, path)
        return
    script = Path(linkers.find_linker(triple, path))
    assert "-m ziglang cc -target riscv64-linux-gnu" in script.read_text()
    assert os.access(script, os.X_OK)
    with pytest.raises(LinkerNotFound, match=r"only be linked on such a machine.*\.tar"):
        linkers.find_linker("aarch64-linux-android", path)


@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
def test_cuda_architectures(architecture) -> None:
    assert gpu_target(f"cuda:{architecture}")["arch"] == architecture


@pytest.mark.parametrize(
    ("device", "host", "error", "message"),
    [
        ("cuda:99", "auto", DeviceError, "no such NVIDIA GPU here.*cuda:sm_90"),
        ("cuda:sm_12", "auto", OptionError, "'sm_12' is not known.*sm_90 .H100"),
        ("vulkan", "auto", DeviceError, "without Vulkan.*USE_VULKAN=ON"),
        ("webgpu:1", "auto", OptionError, "write webgpu alone"),
        ("metal:generic", "auto", OptionError, "'generic' is no number"),
        ("tpu", "auto", OptionError, "'tpu' is not known; use auto or one of cuda.*webgpu"),
        ("aarch64", "riscv", OptionError, "'riscv' is no system.*linux-android"),
        ("x86-64-v3", "aarch64-linux-android", OptionError, "does not go with the x86_64 CPU"),
    ],
)
def test_unknown_devices_are_refused(device, host, error, message) -> None:
    with pytest.raises(error, match=message):
        describe_any_target(device, "O2", host)


@pytest.mark.parametrize("opt", ["O2;flashinfer=1", "activations=float32"])
def test_settings_without_effect_are_refused(opt) -> None:
    with pytest.raises(OptionError, match="has no effect on webgpu"):
        describe_any_target("webgpu", opt)


@pytest.mark.parametrize(
    ("model", "quantization", "message"),
    [
        ("gpt_oss", "q4f16_1", "gpt_oss for webgpu: its attention has scores that sink"),
        ("deepseek_v2", "q4f16_1", "deepseek_v2 for webgpu: its attention is latent"),
        ("gemma2", "q4f16_1", "gemma2 for webgpu: its attention has soft-capped scores"),
        ("gpt2", "q4f16_1", "gpt2 for webgpu: it is not the usual decoder"),
        ("qwen3_5", "q4f16_1", "qwen3_5_text for webgpu: it has recurrent state"),
        ("baichuan2", "q4f16_1", "its attention, .* does not fit the kernels of TVM's cache"),
    ],
)
def test_models_are_refused_by_name(tiny_models, model, quantization, message) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        compile_for(tiny_models.artifact(model, quantization), "webgpu")


def test_numbers_that_gpus_lack_are_refused(tiny_models) -> None:
    with pytest.raises(OptionError, match=r"q4bf16_1 has numbers in bfloat16.*q4f16_1"):
        compile_for(tiny_models.artifact("llama_gqa", "q4bf16_1"), "webgpu")


def test_what_buffers_cannot_hold_is_refused(tiny_models) -> None:
    artifact = tiny_models.artifact("llama_gqa", "q4f16_1")
    with pytest.raises(OptionError, match=r"context_window_size=100000000 takes .* use [0-9]+ or"):
        compile_for(artifact, "webgpu", overrides={"context_window_size": 100_000_000})
    layout = KVCacheLayout(1, 1, 64, 16, "float16")
    huge = TensorSpec("lm_head.weight", (262_144, 4096), "float16")
    with pytest.raises(UnsupportedModel, match=r"lm_head.weight has 2,048 MiB, and .* 1,024 MiB"):
        check_buffers([huge], layout, 4096)
    check_buffers([dataclasses.replace(huge, shape=(131_072, 4096))], layout, 4096)


def test_embeddings_are_refused_for_browsers(tiny_models) -> None:
    artifact = tiny_models.artifact("llama_gqa")
    with pytest.raises(UnsupportedModel, match="made for the engine only, not for webgpu"):
        compile_for(artifact, "webgpu", overrides={"model_task": "embedding"})


def test_emscripten_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LinkerNotFound, match=r"no emcc; install it.*apt install emscripten.*\.tar"):
        emscripten.require_emscripten(Path("model.wasm"))
