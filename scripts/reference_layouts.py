"""Rewrite checkpoints of transformers in the layouts of families that transformers does not have.

Each of these families computes what an architecture of transformers computes; only the names, the
order of rows and the configuration differ. Published checkpoints were the model for both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]
Layout = Callable[[dict[str, Any], Config, Tensors], tuple[Config, Tensors]]


def rewrite(case: dict[str, Any], directory: Path) -> None:
    """Rewrite the checkpoint in a directory as the family of the case stores it."""
    layout = LAYOUTS.get(case["model_type"])
    if layout is None:
        return
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    config = json.loads(config_path.read_text())
    tensors = load_file(weights_path)
    plain = {"transformers_version": "4.40.0", "torch_dtype": "float32"}
    for name in (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "bos_token_id",
        "eos_token_id",
    ):
        plain[name] = config[name]
    fields, tensors = layout(case, config, tensors)
    config_path.write_text(json.dumps({**plain, **fields}, indent=2, sort_keys=True) + "\n")
    save_file(tensors, weights_path, metadata={"format": "pt"})


def as_family(case: dict[str, Any], model: Any) -> Any:
    """Return the model with what its family computes beyond the architecture of transformers."""
    if case.get("normalized_head"):
        head = model.lm_head.weight
        head.data = torch.nn.functional.normalize(head.data)
    for layer in model.modules() if case["model_type"] == "deepseek" else ():
        if hasattr(layer, "shared_expert_gate"):
            layer.shared_expert_gate.weight.data.zero_()  # half of what is shared, always
    if not case.get("alibi"):
        return model
    heads = case["config"]["num_attention_heads"]

    def call(tokens: torch.Tensor, **options: Any) -> Any:
        return model(tokens, attention_mask=_alibi(heads, tokens.shape[1]), **options)

    return call


def _alibi(heads: int, num_tokens: int) -> torch.Tensor:
    """Return what ALiBi adds to scores, (1, heads, n, n): slopes times distances, and a mask.

    Press et al. 2022. The model itself must be made without positions.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    places = np.arange(num_tokens)
    distance = places[None, :] - places[:, None]
    bias = np.asarray(slopes)[:, None, None] * distance
    bias = np.where(distance > 0, np.finfo(np.float32).min, bias)
    return torch.from_numpy(bias.astype(np.float32))[None]


def _llama_fields(config: Config) -> Config:
    names = ("intermediate_size", "num_hidden_layers", "max_position_embeddings", "hidden_act")
    kept = {name: config[name] for name in (*names, "rms_norm_eps", "num_key_value_heads")}
    return {**kept, "tie_word_embeddings": config["tie_word_embeddings"]}


def _internlm(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = _llama_fields(config)
    del fields["num_key_value_heads"]
    base = config["rope_parameters"]["rope_theta"]
    fields.update(architectures=["InternLMForCausalLM"], model_type="internlm", bias=True)
    fields["rotary"] = {"base": base, "type": "dynamic"}
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = base ** -(np.arange(half, dtype=np.float32) / half)
    return fields, tensors


def _internlm2(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = _llama_fields(config)
    fields.update(architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=False)
    fields["rope_theta"] = config["rope_parameters"]["rope_theta"]
    fields["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    kv_heads = config["num_key_value_heads"]
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
    }
    written = {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            # The queries of each KV head, then its key, then its value.
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            grouped = [part.reshape(kv_heads, -1, part.shape[1]) for part in parts]
            joined = np.concatenate(grouped, axis=1).reshape(-1, tensor.shape[1])
            written[name.replace("self_attn.q_proj", "attention.wqkv")] = joined
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            written[_replace(name, names)] = tensor
    return fields, written


def _baichuan(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = _llama_fields(config)
    del fields["num_key_value_heads"]
    fields.update(architectures=["BaichuanForCausalLM"], model_type="baichuan")
    fields["model_max_length"] = fields["max_position_embeddings"]
    if case.get("alibi"):
        del fields["max_position_embeddings"]
    if case.get("normalized_head"):
        fields["z_loss_weight"] = 0
    return fields, _join_qkv(tensors, "self_attn.W_pack", {})


def _orion(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = _llama_fields({**config, "rms_norm_eps": config["layer_norm_eps"]})
    fields.update(architectures=["OrionForCausalLM"], model_type="orion", attention_bias=False)
    fields["rope_theta"] = config["rope_parameters"]["rope_theta"]
    return fields, tensors


def _minicpm(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = _llama_fields(config)
    # Published configurations leave to the program that the output layer is the table.
    if fields["tie_word_embeddings"]:
        del fields["tie_word_embeddings"]
    depth = config["residual_multiplier"] * math.sqrt(config["num_hidden_layers"])
    fields.update(
        architectures=["MiniCPMForCausalLM"],
        model_type="minicpm",
        scale_emb=config["embedding_multiplier"],
        scale_depth=round(depth, 6),
        dim_model_base=round(config["hidden_size"] / config["logits_scaling"]),
    )
    if "num_local_experts" not in config:
        return fields, tensors
    fields.update(
        num_experts=config["num_local_experts"], num_experts_per_tok=config["num_experts_per_tok"]
    )
    return fields, dict(_minicpm_experts(tensors))


def _minicpm_experts(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Take experts apart, as (experts, gate and up, in) and (experts, out, in) hold them."""
    for name, tensor in tensors.items():
        at, _, leaf = name.partition("block_sparse_moe.")
        if leaf == "router.layer.weight":
            yield f"{at}mlp.gate.weight", tensor
        elif leaf:
            for number, matrix in enumerate(tensor):
                expert = f"{at}mlp.experts.{number}"
                if leaf == "output_linear.weight":
                    yield f"{expert}.w2.weight", matrix
                else:
                    gate, up = np.split(matrix, 2)
                    yield f"{expert}.w1.weight", gate
                    yield f"{expert}.w3.weight", up
        else:
            yield name, tensor


def _chatglm(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    rope = config["rope_parameters"]
    fields = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": config["num_hidden_layers"],
        "padded_vocab_size": config["vocab_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "kv_channels": config["head_dim"],
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "add_qkv_bias": config["attention_bias"],
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "original_rope": True,
        "apply_residual_connection_post_layernorm": False,
        "rope_ratio": rope["rope_theta"] / 10000.0,
        "tie_word_embeddings": False,
    }
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "model.layers": "transformer.encoder.layers",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    half = config["head_dim"] // 4
    frequencies = 10000.0 ** -(np.arange(half, dtype=np.float32) / half)
    written = {"transformer.rotary_pos_emb.inv_freq": frequencies}
    return fields, written | _join_qkv(tensors, "self_attention.query_key_value", names)


def _deepseek(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = _llama_fields(config)
    width = config["moe_intermediate_size"]
    fields.update(
        architectures=["DeepseekForCausalLM"],
        model_type="deepseek",
        attention_bias=False,
        first_k_dense_replace=len(config["mlp_only_layers"]),
        moe_intermediate_size=width,
        moe_layer_freq=1,
        n_routed_experts=config["num_experts"],
        n_shared_experts=config["shared_expert_intermediate_size"] // width,
        norm_topk_prob=config["norm_topk_prob"],
        num_experts_per_tok=config["num_experts_per_tok"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        scoring_func="softmax",
    )
    written = {}
    for name, tensor in tensors.items():
        if "shared_expert_gate" in name:
            continue
        half = name.endswith("shared_expert.down_proj.weight")
        ours = name.replace(".shared_expert.", ".shared_experts.")
        written[ours] = tensor / 2 if half else tensor
    return fields, written


def _qwen(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    fields = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "num_hidden_layers": config["num_hidden_layers"],
        "max_position_embeddings": config["max_position_embeddings"],
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "rotary_pct": 1.0,
        "seq_length": config["max_position_embeddings"],
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    }
    return fields, _join_qkv(tensors, "attn.c_attn", names)


def _beside_images(architecture: str, model_type: str, vision: str) -> Layout:
    """Put the text part beside a model of images, whose tensors are of no use here."""

    def layout(case: dict[str, Any], config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        written = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        written[f"{vision}.class_embedding"] = np.ones(4, np.float32)
        written["multi_modal_projector.linear_1.weight"] = np.ones((4, 4), np.float32)
        fields = {"architectures": [architecture], "model_type": model_type}
        return {**fields, "text_config": config, "vision_config": {"hidden_size": 4}}, written

    return layout


def _join_qkv(tensors: Tensors, joined: str, names: dict[str, str]) -> Tensors:
    """Rename tensors; q, k and v of a layer become one called `joined`."""
    written = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            whole = name.replace("self_attn.q_proj", joined)
            written[_replace(whole, names)] = np.concatenate(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            written[_replace(name, names)] = tensor
    return written


def _replace(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


LAYOUTS: dict[str, Layout] = {
    "internlm": _internlm,
    "internlm2": _internlm2,
    "baichuan": _baichuan,
    "orion": _orion,
    "minicpm": _minicpm,
    "chatglm": _chatglm,
    "llama4": _beside_images("Llama4ForConditionalGeneration", "llama4", "vision_model"),
    "ministral3": _beside_images("Mistral3ForConditionalGeneration", "mistral3", "vision_tower"),
    "qwen": _qwen,
    "deepseek": _deepseek,
}
