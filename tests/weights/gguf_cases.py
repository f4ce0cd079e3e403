"""Reference checkpoints written as GGUF, as llama.cpp's converter does."""

import re

import gguf
import numpy as np
from gguf_hybrid_cases import hybrid_metadata, store_hybrid
from make_gguf import interleave_halves, write_gguf

from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.weights.convert import convert
from mlc_llm.weights.gguf_architectures import ARCHITECTURES, MIXTRAL
from mlc_llm.weights.gguf_deepseek import DEEPSEEK3
from mlc_llm.weights.gguf_later import GLM, OLMO3

# Mistral and Mixtral are stored as llama.
ARCH_OF = {architecture.class_name: name for name, architecture in ARCHITECTURES.items()}
ARCH_OF |= {DEEPSEEK3.class_name: "deepseek2"}
ARCH_OF |= {"GlmForCausalLM": "chatglm"}
ARCH_OF |= {"Olmo3ForCausalLM": "olmo2", "GraniteMoeSharedForCausalLM": "granitemoe"}
ARCH_OF |= {"MistralForCausalLM": "llama", "MixtralForCausalLM": "llama"}


def architecture_of(config):
    told_apart = (GLM, MIXTRAL, OLMO3)
    name = config["architectures"][0]
    found = [architecture for architecture in told_apart if architecture.class_name == name]
    return found[0] if found else ARCHITECTURES[ARCH_OF[name]]


def first(config, *names):
    return next((config[name] for name in names if config.get(name) is not None), None)


def metadata_of(config, architecture):
    """Return the metadata of a configuration, under keys without the architecture."""
    heads = first(config, "num_attention_heads", "n_head")
    hidden = first(config, "hidden_size", "n_embd")
    head_dim = first(config, "head_dim", "kv_channels") or hidden // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    scaling = config.get("rope_scaling") or {}
    partial = first(config | rope, "partial_rotary_factor", "rotary_pct")
    if config["model_type"] == "chatglm":
        rope, partial = {"rope_theta": 10000 * config["rope_ratio"]}, 0.5
    values = {
        "block_count": first(config, "num_hidden_layers", "n_layer", "num_layers"),
        "context_length": first(config, "max_position_embeddings", "n_positions", "seq_length"),
        "embedding_length": hidden,
        "feed_forward_length": first(
            config, "intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_hidden_size"
        )
        or (None if config.get("moe_intermediate_size") else 4 * hidden),
        "attention.head_count": heads,
        "attention.head_count_kv": first(config, "num_key_value_heads", "multi_query_group_num")
        or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.get(
            architecture.fields.get("rms_norm_eps") or "rms_norm_eps"
        ),
        "rope.freq_base": first(config | rope, "rope_theta", "rotary_emb_base"),
    }
    if architecture.with_window or architecture.model_type == "llama":
        values["attention.sliding_window"] = config.get("sliding_window")
    if partial is not None:
        values["rope.dimension_count"] = int(head_dim * partial)
    if config["model_type"] == "hunyuan_v1_dense":
        stretch = scaling["alpha"] ** (head_dim / (head_dim - 2))
        values["rope.freq_base"] = config["rope_theta"] * stretch
    if first(scaling | rope, "rope_type", "type") == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = first(scaling | rope, "factor")
    kinds = config.get("layer_types")
    if config["model_type"] == "cohere2":
        each = config["sliding_window_pattern"]
        kinds = [
            "full_attention" if (layer + 1) % each == 0 else "sliding_attention"
            for layer in range(values["block_count"])
        ]
    if config["model_type"] in ("cohere2", "exaone4", "olmo3"):
        values["attention.sliding_window_pattern"] = [kind != "full_attention" for kind in kinds]
    if config["model_type"] in ("arcee", "gpt_oss", "ministral3", "olmo3"):
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = rope["factor"]
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
        for name in ("beta_fast", "beta_slow"):
            values[f"rope.scaling.yarn_{name}"] = rope[name]
    for field, (key, _, default) in architecture.numbers.items():
        # transformers 5 has another name for one of them.
        found = first(config | rope, field, field.replace("num_experts", "num_local_experts"))
        values[key] = default if found is None else found
    if config.get("linear_num_key_heads"):
        values.update(hybrid_metadata(config))
    if config["model_type"] == "minicpm":
        values["residual_scale"] = config["scale_depth"] / values["block_count"] ** 0.5
        values["logit_scale"] = hidden / config["dim_model_base"]
    if config["model_type"] == "deepseek_v2":
        for key in ("key_length", "value_length"):
            values[f"attention.{key}"] = values.pop(f"attention.{key}_mla")
    if config["model_type"] == "deepseek_v3":
        # As converters write it today; the other generation is written as the first ones did.
        latent = config["kv_lora_rank"]
        values["attention.head_count_kv"] = 1
        values["attention.key_length"] = latent + config["qk_rope_head_dim"]
        values["attention.value_length"] = latent
        values["expert_gating_func"] = gguf.ExpertGatingFuncType.SIGMOID
    if "rope_theta" in local:
        values["rope.freq_base_swa"] = local["rope_theta"]
    return {key: value for key, value in values.items() if value is not None}


def gguf_name_of(name, architecture):
    """Return the GGUF name of a tensor, and the number of its expert."""
    stem, _, kind = name.rpartition(".")
    numbers = re.findall(r"\.(\d+)\.", stem)
    for gguf_name, other in architecture.exact.items():
        if other == re.sub(r"\.\d+\.", ".{layer}.", name):
            return gguf_name.replace("{layer}", numbers[0] if numbers else ""), gguf_name, None
    for gguf_name, other in architecture.tensors.items():
        pattern = re.escape(other).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
        if re.fullmatch(pattern, stem):
            layer = gguf_name.replace("{layer}", numbers[0] if numbers else "")
            return f"{layer}.{kind}", gguf_name, int(numbers[1]) if "{expert}" in other else None
    raise AssertionError(f"{name} has no place in GGUF")


def as_stored(tensor, change, metadata):
    heads, kv_heads = metadata["attention.head_count"], metadata["attention.head_count_kv"]
    match change:
        case "q_halves":
            return interleave_halves(tensor, heads)
        case "k_halves":
            return interleave_halves(tensor, kv_heads)
        case "plus_one":
            return tensor + np.float32(1)
        case "transposed" if tensor.ndim == 2:
            return np.ascontiguousarray(tensor.T)
        case "flat":
            return tensor[0]
        case "qkv_groups":
            size = len(tensor) // heads // 3
            rows = [
                row + part * size + head * 3 * size
                for part in range(3)
                for head in range(heads)
                for row in range(size)
            ]
            return tensor[rows]
    return tensor


def split_parts(name, tensor, metadata):
    """Yield a tensor, or its parts: q, k and v, or experts, where the converter takes them apart.

    Experts are put together again by `write_case`.
    """
    heads, kv_heads = metadata["attention.head_count"], metadata["attention.head_count_kv"]
    size = metadata["attention.key_length"]
    if metadata.get("expert_gating_func") and name.endswith("kv_b_proj.weight"):
        key_len = metadata["attention.key_length_mla"] - metadata["rope.dimension_count"]
        rows = tensor.reshape(heads, -1, tensor.shape[1])
        yield name.replace("kv_b", "k_b"), rows[:, :key_len].swapaxes(1, 2)
        yield name.replace("kv_b", "v_b"), rows[:, key_len:]
    elif metadata.get("expert_gating_func") and name.endswith("e_score_correction_bias"):
        yield name.replace("_bias", ".bias"), tensor
    elif name.endswith("W_pack.weight"):
        for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
            yield name.replace("W_pack", f"{part}_proj"), rows
    elif ".wqkv." in name:
        groups = tensor.reshape(kv_heads, heads // kv_heads + 2, size, -1)
        parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
        for part, rows in parts.items():
            yield name.replace("wqkv", f"w{part}"), rows.reshape(-1, tensor.shape[1])
    elif name.endswith(".sinks"):
        yield f"{name}.weight", tensor
    elif name.endswith("shared_mlp.input_linear.weight"):
        for part, rows in zip(("gate", "up"), np.split(tensor, 2), strict=True):
            yield name.replace("shared_mlp.input_linear", f"mlp.shared_expert.{part}_proj"), rows
    elif name.endswith("shared_mlp.output_linear.weight"):
        yield name.replace("shared_mlp.output_linear", "mlp.shared_expert.down_proj"), tensor
    elif name.endswith("_linear.weight"):
        prefix = name.partition("block_sparse_moe")[0] + "mlp.experts"
        for expert, rows in enumerate(tensor):
            if name.endswith("output_linear.weight"):
                yield f"{prefix}.{expert}.down_proj.weight", rows
            else:
                gate, up = np.split(rows, 2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
    elif ".feed_forward.experts." in name:
        experts, _, part = name.rpartition(".")
        for expert, rows in enumerate(tensor.swapaxes(1, 2)):
            if part == "down_proj":
                yield f"{experts}.{expert}.down_proj.weight", rows
            else:
                gate, up = np.split(rows, 2)
                yield f"{experts}.{expert}.gate_proj.weight", gate
                yield f"{experts}.{expert}.up_proj.weight", up
    elif re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", name):
        experts, _, part = name.rpartition(".")
        leaf = "bias" if part.endswith("_bias") else "weight"
        for expert, rows in enumerate(tensor if leaf == "bias" else tensor.swapaxes(1, 2)):
            if "down" in part:
                yield f"{experts}.{expert}.down_proj.{leaf}", rows
            else:
                yield f"{experts}.{expert}.gate_proj.{leaf}", rows[0::2]
                yield f"{experts}.{expert}.up_proj.{leaf}", rows[1::2]
    else:
        yield name, tensor


def llama3_factors(rope, head_dim):
    """Return what rotary frequencies are divided by."""
    factors = []
    context, low, high = (
        rope[name]
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    for pair in range(head_dim // 2):
        turns = context / (2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim))
        if turns > high:
            factors.append(1)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_case(path, source):
    config = source.config
    architecture = architecture_of(config)
    metadata = metadata_of(config, architecture)
    tensors, stacks = {}, {}
    for name in source.names():
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        if name.endswith(".inv_freq"):
            continue
        whole = np.asarray(source.read(name)).astype(np.float32)
        whole = store_hybrid(name, whole, config)
        for part, tensor in split_parts(name, whole, metadata):
            stored, pattern, expert = gguf_name_of(part, architecture)
            change = architecture.changes.get(pattern)
            if change != "plus_one" or not part.endswith(".bias"):
                tensor = as_stored(tensor, change, metadata)
            if expert is None:
                tensors[stored] = tensor
            else:
                stacks.setdefault(stored, {})[expert] = tensor
    for name, parts in stacks.items():
        tensors[name] = np.stack([parts[expert] for expert in range(len(parts))])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for length in ("long", "short"):
        if f"{length}_factor" in rope:
            factors = np.array(rope[f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = factors
    if "low_freq_factor" in rope:
        tensors["rope_freqs.weight"] = llama3_factors(rope, metadata["attention.key_length"])
    arch = ARCH_OF[config["architectures"][0]]
    remove = ("attention.layer_norm_rms_epsilon", "feed_forward_length", "rope.freq_base")
    remove = tuple(key for key in remove if key not in metadata)
    return write_gguf(path, tensors, arch=arch, metadata=metadata, remove=remove)


def converted(source, output):
    """Return the family, the configuration and the exact weights of a checkpoint."""
    family = find_family(source.config)
    config = family.config_from_huggingface(source.config)
    plan = plan_parameters(family, config, get_scheme("q0f32"))
    convert(plan, source, output, lambda done, total, name: None)
    files = sorted(path for path in output.iterdir() if path.suffix == ".bin")
    return family, config, b"".join(path.read_bytes() for path in files)
