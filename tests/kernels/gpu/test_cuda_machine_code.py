"""Kernels of models as NVIDIA's machine code: what they take of a multiprocessor, tensor cores."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cuda_on_cpu import translate
from reference_cases import get_case

from mlc_llm.artifact import ChatConfig
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.compiler.cuda_code import assemble
from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.kernels.gpu import experts, linear
from mlc_llm.kernels.gpu.delta_rule import gated_delta_rule
from mlc_llm.kernels.gpu.expert_weights import ExpertWeights
from mlc_llm.kernels.gpu.recurrence import causal_conv, token_shift, wkv
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

# Of a multiprocessor since the V100, and of a block that does not ask for more.
REGISTERS, SHARED_BYTES = 65536, 49152
# What blocks may ask for: the least of GPUs with so many tensor cores, an RTX 30.
MOST_SHARED_BYTES = 99 << 10
_THREADS = re.compile(r"__global__ void __launch_bounds__\((\d+)\) (\w+)\(")


def source_of(case: str, quantization: str, architecture: str) -> str:
    """Return the CUDA source of a test model's library; needs no weights."""
    huggingface = get_case(case).config()
    family = find_family(huggingface)
    config = family.config_from_huggingface(huggingface)
    chat_config = ChatConfig(
        model_type=family.name,
        quantization=quantization,
        model_config=config.to_json(),
        vocab_size=config.vocab_size,
        context_window_size=config.context_window_size,
        prefill_chunk_size=config.prefill_chunk_size,
        conv_template={},
    )
    options = CompileOptions(device=f"cuda:{architecture}")
    compiled = compile_model(chat_config, options, lambda _: None)
    ((host,),) = [compiled.executable.mod.imports]
    (device,) = host.imports
    return str(device.inspect_source())


def check_resources(source: str, architecture: str) -> list[str]:
    """Check every kernel of a source; return their names."""
    threads = {name: int(count) for count, name in _THREADS.findall(source)}
    taken = assemble(source, architecture).resources()
    assert taken.keys() == threads.keys()
    for name, resources in taken.items():
        assert not resources.spilled_bytes, name
        assert 0 < resources.registers * threads[name] <= REGISTERS, name
        assert resources.shared_bytes <= SHARED_BYTES, name
    return list(threads)


@pytest.mark.parametrize(
    ("case", "quantization", "architecture"),
    [
        ("llama_gqa", "q4f16_1", "sm_80"),
        ("llama_gqa", "q0f16", "sm_90"),
        ("qwen2_gqa", "q4f32_1", "sm_80"),  # with biases
        ("gemma2", "q4f16_1", "sm_90"),  # with soft caps, and windows in every other layer
    ],
)
def test_kernels_of_models_fit(case, quantization, architecture) -> None:
    names = check_resources(source_of(case, quantization, architecture), architecture)
    for part in ("linear", "attention", "rms_norm", "embed" if "q4" in quantization else "rows"):
        assert any(part in name for name in names), part


def product(n: int | None, quantization: str) -> Any:
    """Return the kernel of a linear layer for n rows."""
    scheme = get_scheme(quantization)
    if quantization == "q0f16":
        return linear.matmul(n, 256, 128, "float16", "float16", False)
    form = group_format(scheme, is_linear=True)
    return linear.group_matmul(n, 256, 128, form, "float16", False)


@pytest.mark.parametrize("quantization", ["q0f16", "q4f16_1"])
def test_prompts_are_multiplied_on_tensor_cores(quantization) -> None:
    source, host = translate(product(None, quantization), "sm_80")
    assert "wmma::mma_sync" in source
    check_resources(source, "sm_80")
    # Their shared memory is asked for when they are started.
    asked = re.search(r"T\.int64\((\d+)\), launch_params=\[.*use_dyn_shared_memory", host)
    assert asked and SHARED_BYTES < int(asked[1]) <= MOST_SHARED_BYTES


def test_prompts_do_without_where_tiles_do_not_fit() -> None:
    source, host = translate(product(None, "q0f16"), "sm_75")
    assert "wmma" not in source and "use_dyn_shared_memory" not in host
    check_resources(source, "sm_75")


def test_threads_share_the_sums_of_one_token() -> None:
    source, _ = translate(product(1, "q4f16_1"), "sm_90")
    assert "__shfl_down_sync" in source
    check_resources(source, "sm_90")


# Of RWKV's 7B models and of Qwen3.5's 9B.
@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (token_shift, (4096, "float16")),
        (wkv, (64, 64, "float16", "float32", False)),
        (wkv, (64, 64, "float16", "float32", True)),
        (causal_conv, (8192, 4, "float16", "float16")),
        (gated_delta_rule, (DeltaShape(16, 32, 128, 128), "float16", "float32")),
    ],
)
def test_states_fit_in_registers(factory, options) -> None:
    source, _ = translate(factory(*options), "sm_80")
    check_resources(source, "sm_80")


@pytest.mark.parametrize(
    ("quantization", "shape"),
    [("q4f16_1", (8, 28672, 4096)), ("q0f16", (128, 1536, 2048)), ("q0f16", (256, 4096, 7168))],
)
def test_products_with_experts_fit(quantization, shape) -> None:
    form = None if quantization == "q0f16" else group_format(get_scheme(quantization), False)
    weights = ExpertWeights(*shape, "float16", form)
    kernel = experts.matmul(weights, Routing(shape[0], 2), False, "float16", 16)
    source, _ = translate(kernel, "sm_90")
    assert len(check_resources(source, "sm_90")) == 2  # of single pairs, and of tiles
    # More weights than 32 bits can number.
    assert ("int64_t" in source.split("__global__", 1)[1]) == (shape[0] == 256)
    # Threads load 16 bytes at once.
    assert "uint4*)(w" in source
