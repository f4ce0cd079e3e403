"""Parameter names and layouts that MLC LLM gives Mixtral, Qwen2-MoE and Qwen3-MoE.

Part of the independent packer: shares no code with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under MLC names; the experts of a layer are one array."""
    is_mixtral = config["model_type"] == "mixtral"
    qkv = "self_attn.qkv_proj" if is_mixtral else "self_attn.c_attn"
    for name, weight in weights.items():
        prefix = name.rpartition(".")[0]
        if ".experts." in name:
            if ".experts.0." in name:
                yield from _experts(weights, name, is_mixtral)
        elif prefix.endswith("self_attn.q_proj"):
            joined = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            yield name.replace("self_attn.q_proj", qkv), np.concatenate(joined)
        elif prefix.endswith(".gate_proj"):
            joined = [weight, weights[name.replace(".gate_proj.", ".up_proj.")]]
            yield name.replace("gate_proj", "gate_up_proj"), np.concatenate(joined)
        elif not prefix.endswith((".k_proj", ".v_proj", ".up_proj")):
            yield name.replace("block_sparse_moe", "moe"), weight


def _experts(weights: Weights, name: str, is_mixtral: bool) -> Iterator[tuple[str, Array]]:
    theirs, _, part = name.partition(".experts.0.")
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    ours = ("e1_e3", "e2") if is_mixtral else ("moe_gate_up_proj", "moe_down_proj")
    count = sum(n.startswith(f"{theirs}.experts.") and n.endswith(part) for n in weights)
    block = theirs.replace("block_sparse_moe", "moe")

    def matrices(kind: str) -> list[Array]:
        return [weights[f"{theirs}.experts.{e}.{kind}.weight"] for e in range(count)]

    if part == f"{gate}.weight":
        both = zip(matrices(gate), matrices(up), strict=True)
        yield f"{block}.{ours[0]}.weight", np.stack([np.concatenate(pair) for pair in both])
    elif part == f"{down}.weight":
        yield f"{block}.{ours[1]}.weight", np.stack(matrices(down))


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of MLC LLM's class of the family beyond those of its dense relative."""
    if config["model_type"] == "mixtral":
        names = ("num_local_experts", "num_experts_per_tok")
        return {name: config[name] for name in names}
    names = ("moe_intermediate_size", "num_experts_per_tok", "decoder_sparse_step")
    fields = {name: config[name] for name in (*names, "norm_topk_prob")}
    fields["num_experts"] = config.get("num_experts", config.get("num_local_experts"))
    if config["model_type"] == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = config["shared_expert_intermediate_size"]
    return fields
