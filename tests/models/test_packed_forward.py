"""Models that keep the codes of a quantized checkpoint, against the dequantized model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_blocks import random_blocks
from numpy.typing import NDArray
from numpy_model import forward
from packed_layouts import awq_pack, awq_unpack, read_float8, store_blocks, unpack_format
from paged_sequence import PagedSequence
from safetensors.numpy import save_file
from tiny_models import FLOAT_OPT, INT8_OPT, NUM_PAGES, PAGE_SIZE, relative_error, run_step

from mlc_llm.artifact import ChatConfig, read_tensor_index, write_chat_config
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.errors import OptionError, UnsupportedModel
from mlc_llm.prepare.original import read_compile_config
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import convert_weights
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.parameters import load_parameters

pytestmark = pytest.mark.cpu

Weights = dict[str, NDArray[Any]]
VOCAB, HIDDEN, FFN, HEADS, KV_HEADS = 48, 256, 512, 4, 2
KV = HIDDEN // HEADS * KV_HEADS
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "torch_dtype": "float16",
}
LAYER = "model.layers.0."
# Name below the layer -> (out, in).
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
PROMPT = [1, 5, 40, 7, 7, 30, 2, 11, 19, 47, 0, 3]
# Only float32 sums round; int8 activations round more.
EXACT, ROUNDED = 2e-5, 6e-2


def other_weights(rng: np.random.Generator, dtype: Any) -> Weights:
    """Return what is not a linear layer, in the model's dtype."""
    return {
        "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(dtype),
        "lm_head.weight": (rng.standard_normal((VOCAB, HIDDEN)) * 0.1).astype(dtype),
        "model.norm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(dtype),
        LAYER + "input_layernorm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(dtype),
        LAYER + "post_attention_layernorm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(dtype),
    }


def write_checkpoint(directory: Path, tensors: Weights, settings: Mapping[str, Any]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    config = {**CONFIG, "quantization_config": dict(settings)}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def convert(source: Path, output: Path, quantization: str) -> ChatConfig:
    """Convert weights and return the configuration that a library is compiled for."""
    config = read_compile_config(source, quantization=quantization)
    convert_weights(source, output, quantization=quantization, progress=NullProgress())
    write_chat_config(output, config)
    return config


def compiled_logits(
    config: ChatConfig, artifact: Path, work: Path, opt: str = FLOAT_OPT, chunk: int = 100
) -> NDArray[np.float32]:
    """Compile, load and run the prompt, `chunk` tokens a step."""
    options = CompileOptions("cpu", opt, {"kv_cache_dtype": "float32"})
    if not work.exists():
        compile_model(config, options, lambda _: None).save_objects(work)
    library = load_library(work)
    runner = CompiledRunner(library, load_parameters(artifact, library, lambda _: None), NUM_PAGES)
    sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
    parts = [PROMPT[i : i + chunk] for i in range(0, len(PROMPT), chunk)]
    return np.concatenate([run_step(runner, [(sequence, part)])[0] for part in parts])


def check_both_paths(config: ChatConfig, artifact: Path, work: Path, weights: Weights) -> None:
    """Float activations give the dequantized model; int8 ones come near, differently."""
    expected = forward({**CONFIG}, weights, PROMPT)
    for chunk in (100, 1):
        logits = compiled_logits(config, artifact, work / "float", FLOAT_OPT, chunk)
        assert relative_error(logits, expected) < EXACT
    one, many = (compiled_logits(config, artifact, work / "int8", INT8_OPT, n) for n in (1, 100))
    np.testing.assert_array_equal(one, many)
    assert EXACT < relative_error(many, expected) < ROUNDED


@pytest.fixture(scope="module")
def awq_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """Return a checkpoint as AutoAWQ writes it, and what it stands for."""
    rng = np.random.default_rng(1)
    tensors = other_weights(rng, np.float16)
    weights = dict(tensors)
    for name, (rows, columns) in LINEARS.items():
        groups = columns // 128
        packed = {
            "qweight": awq_pack(rng.integers(0, 16, (columns, rows))),
            "qzeros": awq_pack(rng.integers(5, 11, (groups, rows))),
            "scales": rng.uniform(0.01, 0.03, (groups, rows)).astype(np.float16),
        }
        weights[f"{LAYER}{name}.weight"] = awq_unpack(**packed)
        for part, array in packed.items():
            stored = array.view(np.int32) if array.dtype == np.uint32 else array
            tensors[f"{LAYER}{name}.{part}"] = stored
    settings = {
        **{"quant_method": "awq", "bits": 4, "group_size": 128},
        **{"version": "gemm", "zero_point": True},
    }
    directory = tmp_path_factory.mktemp("awq") / "model"
    return write_checkpoint(directory, tensors, settings), weights


def test_awq_keeps_its_integers_and_runs(awq_source: Any, tmp_path: Path) -> None:
    source, weights = awq_source
    config = convert(source, tmp_path / "out", "q4f16_autoawq")
    index = read_tensor_index(tmp_path / "out")
    qkv = [index.read(f"{LAYER}self_attn.qkv_proj.{p}") for p in ("qweight", "qzeros", "scales")]
    parts = [weights[f"{LAYER}self_attn.{p}_proj.weight"] for p in "qkv"]
    np.testing.assert_array_equal(awq_unpack(*qkv), np.concatenate(parts))
    assert index.records["lm_head.weight"].spec.dtype == "float16"
    assert index.records["model.embed_tokens.weight"].spec.dtype == "float16"
    check_both_paths(config, tmp_path / "out", tmp_path, weights)


def test_awq_from_float_weights_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors = other_weights(rng, np.float16)
    for name, shape in LINEARS.items():
        tensors[f"{LAYER}{name}.weight"] = rng.standard_normal(shape).astype(np.float16)
    source = tmp_path / "model"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsupportedModel, match="name an AWQ repository"):
        convert(source, tmp_path / "out", "q4f16_autoawq")
    with pytest.raises(OptionError, match=r"keeps the codes of a GGUF file.*has none"):
        convert(source, tmp_path / "out", "gguf")


@pytest.mark.parametrize("suffix", ["", "_static_activation"])
def test_float8_blocks_of_a_checkpoint_stay_and_run(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(3)
    tensors = other_weights(rng, ml_dtypes.bfloat16)
    weights = dict(tensors)
    for name, shape in LINEARS.items():
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        stored = dict(store_blocks(False)(f"{LAYER}{name}.weight", values))
        tensors.update(stored)
        weights[f"{LAYER}{name}.weight"] = read_float8(stored, LAYER + name)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    source = write_checkpoint(tmp_path / "model", tensors, settings)
    config = convert(source, tmp_path / "out", f"fp8_e4m3fn_bf16_block_scale{suffix}")
    index = read_tensor_index(tmp_path / "out")
    found = index.read(LAYER + "mlp.down_proj.weight").view(np.uint8)
    expected = tensors[LAYER + "mlp.down_proj.weight"].view(np.uint8)
    np.testing.assert_array_equal(found, expected)
    # bfloat16 embeddings and activations would round; the float path does not.
    expected_logits = forward({**CONFIG}, weights, PROMPT)
    for chunk in (100, 1):
        logits = compiled_logits(config, tmp_path / "out", tmp_path / "float", FLOAT_OPT, chunk)
        assert relative_error(logits, expected_logits) < EXACT


# Each encoding once or more, and layers fused of different ones.
MIXED = {
    "token_embd": "Q6_K",
    "output": "Q8_0",
    "blk.0.attn_q": "Q4_K",
    "blk.0.attn_k": "Q4_K",
    "blk.0.attn_v": "Q6_K",
    "blk.0.attn_output": "Q5_K",
    "blk.0.ffn_gate": "Q3_K",
    "blk.0.ffn_up": "Q3_K",
    "blk.0.ffn_down": "Q2_K",
}
SIMPLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"]
GGUF_SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output": (VOCAB, HIDDEN),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (KV, HIDDEN),
    "blk.0.attn_v": (KV, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate": (FFN, HIDDEN),
    "blk.0.ffn_up": (FFN, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, FFN),
}


def write_quantized_gguf(path: Path, encodings: Mapping[str, str]) -> Path:
    """Write a Llama of one layer, each matrix in its encoding."""
    rng = np.random.default_rng(4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        # Norms are stored as float16.
        norm = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float16).astype(np.float32)
        writer.add_tensor(f"{name}.weight", norm)
    for name, (rows, columns) in GGUF_SHAPES.items():
        kind = gguf.GGMLQuantizationType[encodings[name]]
        blocks = random_blocks(rng, kind, rows, columns)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("encoding", ["mixed", *SIMPLE])
def test_gguf_codes_stay_and_run(tmp_path: Path, encoding: str) -> None:
    from mlc_llm.weights.gguf import GGUFSource

    encodings = MIXED if encoding == "mixed" else dict.fromkeys(GGUF_SHAPES, encoding)
    path = write_quantized_gguf(tmp_path / "model.gguf", encodings)
    config = convert(path, tmp_path / "out", "gguf")
    if encoding == "mixed":
        assert config.layer_formats[LAYER + "self_attn.qkv_proj"] == "q6_g16_min"
    source, index = GGUFSource(path), read_tensor_index(tmp_path / "out")
    weights = {name: source.read(name) for name in source.names()}
    # The artifact's own values, within the rounding of scales of the file's.
    for layer, form in config.layer_formats.items():
        words, scales = (index.read(f"{layer}.{part}") for part in ("q_weight", "q_scale"))
        fused = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        parent, _, leaf = layer.rpartition(".")
        names = [f"{parent}.{part}.weight".lstrip(".") for part in fused.get(leaf, [leaf])]
        value = unpack_format(words, scales, form, weights[names[0]].shape[1])
        original = np.concatenate([weights[name] for name in names])
        assert np.abs(value - original).max() <= 2**-10 * np.abs(original).max()
        sizes = np.cumsum([len(weights[name]) for name in names])[:-1]
        weights.update(zip(names, np.split(value, sizes), strict=True))
    if encoding in ("mixed", "Q4_1"):
        check_both_paths(config, tmp_path / "out", tmp_path, weights)
    else:
        logits = compiled_logits(config, tmp_path / "out", tmp_path / "float")
        assert relative_error(logits, forward({**CONFIG}, weights, PROMPT)) < EXACT
