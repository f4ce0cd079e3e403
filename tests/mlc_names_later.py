"""Parameter names and layouts of families that MLC LLM never had: what it calls their like.

Part of the independent packer: shares no code with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

_GRANITE = (
    ("block_sparse_moe.input_linear", "mlp.e1_e3"),
    ("block_sparse_moe.output_linear", "mlp.e2"),
    ("block_sparse_moe.router.layer", "mlp.gate"),
)
_SHARED = (
    ("shared_mlp.input_linear", "mlp.shared_mlp.gate_up_proj"),
    ("shared_mlp.output_linear", "mlp.shared_mlp.down_proj"),
)
_GLM4 = (
    ("post_attention_layernorm", "pre_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_attention_layernorm"),
    ("post_mlp_layernorm", "post_feedforward_layernorm"),
)
# Family -> what its checkpoints call a part of a name, and what artifacts call it.
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "smollm3": (),
    "granite": (),
    "granitemoe": _GRANITE,
    "granitemoeshared": (*_GRANITE, *_SHARED),
    "granitemoehybrid": (
        ("shared_mlp.input_linear", "mlp.gate_up_proj"),
        ("shared_mlp.output_linear", "mlp.down_proj"),
    ),
    "cohere2": (("self_attn.o_proj", "self_attn.out_proj"),),
    "exaone4": (),
    "glm": (),
    "glm4": _GLM4,
    "olmo3": (),
    "seed_oss": (),
    "ernie4_5": (),
    "arcee": (),
    "hunyuan_v1_dense": (),
    "glm4_moe": (("gate.e_score", "e_score"),),
    "dots1": (("gate.e_score", "e_score"),),
}
MODEL_TYPES = tuple(_NAMES)
# Families that keep gate and up apart.
_APART = ("cohere2", "arcee")
_JOINED = {"q_proj": ("qkv_proj", "k_proj", "v_proj"), "gate_proj": ("gate_up_proj", "up_proj")}


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under the names of artifacts."""
    kind = config["model_type"]
    joined = {
        part: names for part, names in _JOINED.items() if part == "q_proj" or kind not in _APART
    }
    later = [part for names in joined.values() for part in names[1:]]
    for name, weight in weights.items():
        if ".experts." in name:
            yield from stacked_experts(name, weights)
            continue
        path, _, leaf = name.rpartition(".")
        block, _, part = path.rpartition(".")
        if part in later:
            continue
        if part in joined:
            whole, *others = joined[part]
            rest = [weights[f"{block}.{other}.{leaf}"] for other in others]
            name, weight = f"{block}.{whole}.{leaf}", np.concatenate([weight, *rest])
        for theirs, ours in _NAMES[kind]:
            if theirs in name:
                name = name.replace(theirs, ours)
                break
        yield name, weight


def stacked_experts(name: str, weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield all experts of a layer at the tensors of the first: [gate; up], and down."""
    at, _, part = name.partition("experts.0.")
    count = sum(other.startswith(f"{at}experts.") and other.endswith(part) for other in weights)

    def stacked(part: str) -> Array:
        return np.stack([weights[f"{at}experts.{e}.{part}_proj.weight"] for e in range(count)])

    if part == "gate_proj.weight":
        both = np.concatenate([stacked("gate"), stacked("up")], axis=1)
        yield f"{at}moe_gate_up_proj.weight", both
    elif part == "down_proj.weight":
        yield f"{at}moe_down_proj.weight", stacked("down")
