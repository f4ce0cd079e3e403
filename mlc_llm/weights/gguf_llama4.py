"""Llama 4's text part in GGUF files, which lack what all published models have alike.

These are chunks of 8,192 tokens, layers without positions and how queries grow there: what
`models/llama4.py` takes where nothing is said.
"""

from __future__ import annotations

from typing import Any

from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_parts import (
    GATED,
    QWEN_EXPERTS,
    SHARED_EXPERT,
    WITHOUT_FFN,
    Architecture,
)

_MAVERICK_EXPERTS = 128  # its queries and keys are not normalised, unlike those of other models
_FEED_FORWARD = {
    name: other.replace("mlp.", "feed_forward.")
    for name, other in {**GATED, **QWEN_EXPERTS, **SHARED_EXPERT}.items()
    if not other.endswith("shared_expert_gate")
}


def _finish(file: GGUFFile, config: dict[str, Any]) -> None:
    del file
    config["use_qk_norm"] = config["num_local_experts"] != _MAVERICK_EXPERTS


LLAMA4 = Architecture(
    "llama4_text",
    "Llama4ForCausalLM",
    {
        **WITHOUT_FFN,
        **_FEED_FORWARD,
        "blk.{layer}.ffn_gate_inp": "model.layers.{layer}.feed_forward.router",
    },
    fields={"intermediate_size": "intermediate_size_mlp"},
    numbers={
        "intermediate_size": ("expert_feed_forward_length", "count", None),
        "num_local_experts": ("expert_count", "count", None),
        "num_experts_per_tok": ("expert_used_count", "count", None),
        "interleave_moe_layer_step": ("interleave_moe_layer_step", "count", 1),
    },
    constants={"has_split_experts": True},
    finish=_finish,
)
