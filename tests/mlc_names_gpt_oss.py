"""Parameter names and layouts of gpt-oss, which MLC LLM does not have: those of its Qwen3-MoE.

Part of the independent packer: shares no code with mlc_llm. Gates and the others take turns in the
outputs of a checkpoint's experts, whose matrices are (in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

MODEL_TYPES = ("gpt_oss",)


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under the names that artifacts have."""
    del config
    for name, weight in weights.items():
        if ".experts." in name:
            yield _experts(name, weight)
        elif ".q_proj." in name:
            joined = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            yield name.replace("q_proj", "qkv_proj"), np.concatenate(joined)
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield name.replace("mlp.router", "mlp.gate"), weight


def _experts(name: str, weight: Array) -> tuple[str, Array]:
    is_bias = name.endswith("_bias")
    ours = name.removesuffix("_bias").replace("experts.", "moe_")
    if "gate_up" in name:
        weight = np.concatenate([weight[..., 0::2], weight[..., 1::2]], axis=-1)
    if is_bias:
        return ours + ".bias", weight
    return ours + ".weight", np.stack([matrix.T for matrix in weight])


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration itself: there is no class of MLC LLM's."""
    return dict(config)
