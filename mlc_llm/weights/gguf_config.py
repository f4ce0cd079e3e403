"""`config.json` of the model a GGUF file was made of, rebuilt from its metadata.

Knows what decoders have in common; what one architecture has is data of gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.weights.gguf_architectures import ARCHITECTURES, MIXTRAL, PHI_MSFT
from mlc_llm.weights.gguf_deepseek import DEEPSEEK3, add_latent_fields, is_deepseek3
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_later import GLM, OLMO3
from mlc_llm.weights.gguf_metadata import MetadataReader
from mlc_llm.weights.gguf_parts import Architecture
from mlc_llm.weights.gguf_ranking import check_reranker
from mlc_llm.weights.gguf_rope import find_llama3_scaling

_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
MAX_EXPERTS = 4096
# Families whose heads have a size of their own where nothing is said.
_WITH_HEAD_DIM = ("ernie4_5", "gemma", "glm", "qwen3", "seed_oss")
_BAICHUAN_13B_LAYERS = 40
# Layers of the models whose attention is scaled by hidden size / heads, not by the size of a head.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}


# Architectures that are stored as another one, and how a file of theirs is known.
_TOLD_APART: tuple[tuple[str, Callable[[GGUFFile], bool], Architecture], ...] = (
    ("llama", lambda file: file.get("llama.expert_count", int, 0) > 0, MIXTRAL),
    ("phi2", lambda file: "blk.0.attn_qkv.weight" in file.tensors, PHI_MSFT),
    ("olmo2", lambda file: file.get("olmo2.attention.sliding_window", int, 0) > 0, OLMO3),
    ("chatglm", lambda file: "blk.0.attn_q.weight" in file.tensors, GLM),
    ("deepseek2", is_deepseek3, DEEPSEEK3),
)


def find_architecture(file: GGUFFile) -> tuple[str, Architecture]:
    """Return an architecture's name in GGUF and what it is. Raises CorruptFile, UnsupportedModel"""
    name = file.get("general.architecture", str)
    if name is None:
        raise CorruptFile(f"{file.path} does not say its architecture; is it a model?")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path} has architecture {name!r:.60}, which is not supported; GGUF works for "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    for stored_as, is_in, architecture in _TOLD_APART:
        if stored_as == name and is_in(file):
            return name, architecture
    return name, ARCHITECTURES[name]


def build_config(file: GGUFFile, name: str, architecture: Architecture) -> dict[str, Any]:
    """Return what `config.json` of the original model says, as far as programs need it.

    name: of the architecture in the metadata. Raises CorruptFile, ParameterMismatch and
    UnsupportedModel.
    """
    reader = MetadataReader(file, name)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ParameterMismatch(f"{file.path} has no embedding table (token_embd.weight)")
    check_reranker(file)
    hidden_size = reader.count("embedding_length")
    if architecture.is_recurrent:
        num_heads = hidden_size // reader.count("wkv.head_size")
    else:
        num_heads = reader.count("attention.head_count")
    head_dim = reader.count("attention.key_length", hidden_size // max(num_heads, 1))
    if num_heads == 0 or head_dim == 0 or head_dim % 2:
        raise CorruptFile(f"{file.path}: {num_heads} heads of {head_dim} values make no model")
    if not architecture.is_latent:
        reader.refuse_unless("attention.value_length", head_dim, "value heads of another size")
    has_experts = any("{expert}" in stored for stored in architecture.tensors.values())
    if not has_experts:
        reader.refuse_unless("expert_count", 0, "experts")
    elif not 0 < reader.count("expert_count") <= MAX_EXPERTS:
        raise CorruptFile(f"{file.path} claims {reader.count('expert_count'):,} experts")
    # Where all layers have experts, nothing may be said of others.
    dense_width = reader.count("expert_feed_forward_length", 0) if has_experts else None
    model_type = architecture.model_type
    common: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": reader.count("feed_forward_length", dense_width),
        "max_position_embeddings": reader.count("context_length"),
        "num_attention_heads": num_heads,
        "num_hidden_layers": reader.num_layers(),
        "num_key_value_heads": reader.count("attention.head_count_kv", num_heads),
        "rope_theta": reader.real("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "attention_bias": any(f"blk.0.attn_{q}.bias" in file.tensors for q in ("q", "qkv")),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if architecture.fields.get("rms_norm_eps", "") is not None:
        common["rms_norm_eps"] = reader.real("attention.layer_norm_rms_epsilon")
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": model_type,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": embedding.shape[0],
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}.get(embedding.type.name, "float16"),
    }
    for field, value in common.items():
        called = architecture.fields.get(field, field)
        if called is not None:
            config[called] = value
    config |= architecture.constants
    for field, (key, kind, default) in architecture.numbers.items():
        config[field] = reader.number(key, kind, default)
    if head_dim * num_heads != hidden_size or model_type.startswith(_WITH_HEAD_DIM):
        config["head_dim"] = head_dim
    rotary = reader.count("rope.dimension_count", head_dim)
    if architecture.has_partial_rotary:
        config["partial_rotary_factor"] = rotary / head_dim
    elif "rope_theta" in config and not architecture.is_latent:
        reader.refuse_unless("rope.dimension_count", head_dim, "partial rotary embedding")
    if "rope_theta" in config:
        config["rope_scaling"] = _rope_scaling(file, reader, config, rotary)
    _add_sliding_window(reader, architecture, config)
    _add_special_cases(file, config, head_dim)
    if architecture.is_latent:
        add_latent_fields(file, config, head_dim)
    for key in ("bos", "eos"):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            config[f"{key}_token_id"] = token_id
    if architecture.finish is not None:
        architecture.finish(file, config)
    return config


def _rope_scaling(
    file: GGUFFile, reader: MetadataReader, config: dict[str, Any], rotary: int
) -> dict[str, Any] | None:
    kind = reader.text("rope.scaling.type", "none")
    factor = reader.real("rope.scaling.factor", reader.real("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise UnsupportedModel(
            f"{file.path} scales RoPE by {kind!r:.40}; "
            "none, linear, llama3, longrope and yarn are supported"
        )
    if _ROPE_FACTORS in file.tensors:
        factors = file.read(_ROPE_FACTORS).astype(np.float64).ravel()
        return find_llama3_scaling(factors, config["rope_theta"], rotary, str(file.path))
    if _LONG_FACTORS in file.tensors and _SHORT_FACTORS in file.tensors:
        scaling: dict[str, Any] = {"rope_type": "longrope", "type": "longrope"}
        for field, name in (("long_factor", _LONG_FACTORS), ("short_factor", _SHORT_FACTORS)):
            values = file.read(name).astype(np.float32).ravel()
            if values.shape != (rotary // 2,) or not (np.isfinite(values) & (values > 0)).all():
                raise CorruptFile(f"{file.path}: {name} is no table of {rotary // 2} factors")
            # Stored as float32, see MetadataReader.real.
            scaling[field] = [float(str(value)) for value in values]
        return scaling
    if kind == "yarn":
        original = reader.count("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": reader.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": reader.real("rope.scaling.yarn_beta_slow", 1.0),
        }
    if factor in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "type": "linear", "factor": factor}


def _add_sliding_window(
    reader: MetadataReader, architecture: Architecture, config: dict[str, Any]
) -> None:
    window = reader.count("attention.sliding_window", 0)
    if not window or architecture.with_window:
        return
    if config["model_type"] != "llama":
        raise UnsupportedModel(
            f"{reader.path} has a sliding window of {window}, "
            f"which {config['model_type']} models do not support"
        )
    # Mistral is stored as llama; the window is what tells them apart.
    config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)


def _add_special_cases(file: GGUFFile, config: dict[str, Any], head_dim: int) -> None:
    """Add what follows from other numbers, or from tensors that are there."""
    model_type = config["model_type"]
    if model_type in _GEMMA_27B_LAYERS:
        is_27b = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[model_type]
        per_head = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = per_head if is_27b else head_dim
    if model_type == "stablelm":
        config["use_qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
    if model_type == "starcoder2":
        config["use_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if model_type == "gpt_neox":
        config["rotary_pct"] = config.pop("partial_rotary_factor")
    if model_type == "phi3":
        config["original_max_position_embeddings"] = (
            config["original_max_position_embeddings"] or config["max_position_embeddings"]
        )
    if model_type == "baichuan" and config["num_hidden_layers"] == _BAICHUAN_13B_LAYERS:
        # The larger size has ALiBi in place of RoPE, which is said by what is left out.
        config["model_max_length"] = config.pop("max_position_embeddings")
    if model_type == "chatglm":
        config["rope_ratio"] = config.pop("rope_theta") / 10000
    if model_type == "cohere":
        config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.tensors
    if model_type == "ministral3_text":
        _add_ministral_scaling(config)
    if model_type == "minicpm":
        _add_minicpm_factors(config)
    if model_type == "gpt_oss" and config["rope_scaling"]:
        config["rope_scaling"]["truncate"] = False
    if config.get("clip_qkv") == 0:
        config["clip_qkv"] = None
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None


def _add_ministral_scaling(config: dict[str, Any]) -> None:
    """Put what belongs to YaRN where `config.json` has it; `mscale` is 1 in these files."""
    strength, scale = config.pop("llama_4_scaling_beta"), config.pop("mscale_all_dim")
    scaling = config["rope_scaling"] or {}
    if scaling.get("type") == "yarn":
        scaling["llama_4_scaling_beta"] = strength
        if scale:
            scaling.update(mscale=1.0, mscale_all_dim=scale)


def _add_minicpm_factors(config: dict[str, Any]) -> None:
    """Turn what llama.cpp multiplies with into MiniCPM's own numbers.

    Files of early converters have none; llama.cpp then takes those of the model for 2B.
    """
    layers, hidden_size = config["num_hidden_layers"], config["hidden_size"]
    residual, logits = config["scale_depth"], config["dim_model_base"]
    # Stored as float32, see MetadataReader.real.
    depth = float(f"{residual * layers**0.5:.6g}") if residual else 1.4
    config["scale_depth"] = depth
    config["dim_model_base"] = float(f"{hidden_size / logits:.6g}") if logits else 256
